"""The demo: two real models are compressed, inspected and run, each by the public commands.

`make demo` runs it; everything it writes goes to `.demo/`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))
from models import CACHE, MINILM, SMOLLM2, fetch

OUT = CACHE.parent
PROMPT = "Explain in three sentences why the sky is blue."
SENTENCES = (
    "A man is eating food.",
    "Someone is having a meal.",
    "The stock market fell sharply on Monday.",
    "Shares dropped at the start of the week.",
    "A cheetah chases its prey across a field.",
    "Quantization makes neural networks smaller.",
)


def main() -> None:
    """Run both halves of the demo."""
    say("Fetching two real models (about 180 MB, once) ...")
    smollm2, minilm = fetch(SMOLLM2), fetch(MINILM)

    say("1. A language model: GGUF -> 4-bit sketch with 8-bit embeddings -> text")
    sketch = OUT / "smollm2.sktch"
    sketchconv("convert", smollm2, sketch, "--bits", "4", "--embed-bits", "8", "--force")
    sketchconv("inspect", sketch)
    sketchconv("generate", sketch, PROMPT, "--max-new-tokens", "120")

    say("2. An encoder: folder -> 4-bit sketch with 6-bit embeddings -> sentence embeddings")
    folder = OUT / "minilm-sketch"
    sketchconv("convert", minilm, folder, "--bits", "4", "--embed-bits", "6", "--force")
    compare_embeddings(minilm, folder)


def sketchconv(*arguments: object) -> None:
    """Show a command as the user would type it, and run it."""
    words = [os.path.relpath(a) if isinstance(a, Path) else str(a) for a in arguments]
    shown = " ".join(f'"{word}"' if " " in word else word for word in words)
    print(f"\n$ sketchconv {shown}", flush=True)
    subprocess.run([sys.executable, "-P", "-m", "sketchconv", *words], check=True)


def compare_embeddings(dense: Path, sketch: Path) -> None:
    """Print the cosine similarity of the sketch's sentence embeddings with the dense model's."""
    from transformers import AutoModel, AutoTokenizer

    import sketchconv as package

    tokenizer = AutoTokenizer.from_pretrained(dense)
    ours = embed(package.load(sketch), tokenizer)
    theirs = embed(AutoModel.from_pretrained(dense), tokenizer)
    similarity = (ours * theirs).sum(-1)
    print()
    for sentence, value in zip(SENTENCES, similarity.tolist(), strict=True):
        print(f"  {value:.4f}  {sentence}")
    print(
        f"cosine similarity with the dense embeddings: mean {similarity.mean():.4f}, "
        f"lowest {similarity.min():.4f} of {len(SENTENCES)}"
    )


def embed(model: Any, tokenizer: Any) -> Any:
    """Mean-pooled, normalised sentence embeddings, float32 [sentences, hidden]."""
    import torch

    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state.float()
    mask = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def say(text: str) -> None:
    """A heading."""
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    main()
