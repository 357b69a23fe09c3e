"""What a 4-bit sketch without any data costs in perplexity, on SmolLM2-135M-Instruct.

The model's GGUF weights lie on a grid of 16 levels, which would flatter every 4-bit method, so each
decoder weight is first moved off its grid by seeded uniform noise of one grid step; that model, in
bf16, is the dense one.

    python tests/bench/bench_perplexity.py --text wikitext2-test.txt [--windows 4] [--bits 4]
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent))
from models import CACHE, SMOLLM2, fetch

WINDOW = 1024


def dithered(gguf: Path, folder: Path) -> Path:
    """The dense model of this benchmark as a bf16 Hugging Face folder; made once."""
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name and "lm_head" not in name:
                blocks = weight.view(weight.shape[0], -1, 32)
                step = (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)) / 15
                blocks.add_((torch.rand(blocks.shape, generator=generator) - 0.5) * step)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def perplexity(model: Any, tokens: Any, windows: int) -> float:
    """Perplexity over the first windows of 1024 tokens, each predicted from its own start."""
    import torch

    total, count = 0.0, 0
    with torch.inference_mode():
        for n in range(windows):
            window = tokens[n * WINDOW : (n + 1) * WINDOW].unsqueeze(0)
            logits = model(window).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(
                logits, window[0, 1:], reduction="sum"
            ).item()
            count += window.shape[1] - 1
    return math.exp(total / count)


def main() -> None:
    """Print the perplexity of the dense model and of sketches by both weightings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="evaluation text, UTF-8")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--groups", type=int, default=1)
    options = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import sketchconv
    from sketchconv.recipe import Recipe, SketchSpec

    dense = dithered(fetch(SMOLLM2), CACHE.parent / "smollm2-dithered")
    tokenizer = AutoTokenizer.from_pretrained(dense)
    text = options.text.read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer(text)["input_ids"][: options.windows * WINDOW])
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    print(
        f"dense bf16: perplexity {perplexity(model, tokens, options.windows):.2f} "
        f"({options.windows} windows of {WINDOW} tokens)"
    )
    for weighting in ("equal", "moments"):
        recipe = Recipe(SketchSpec(options.bits, options.groups), weighting=weighting)
        out = CACHE.parent / f"smollm2-dithered-{weighting}.sktch"
        report = sketchconv.convert(dense, out, recipe, force=True)
        started = time.perf_counter()
        value = perplexity(sketchconv.load(out, dtype=torch.bfloat16), tokens, options.windows)
        print(
            f"{options.bits} bits, {options.groups} group(s), {report.weighting}: perplexity "
            f"{value:.2f} ({time.perf_counter() - started:.1f} s)"
        )


if __name__ == "__main__":
    main()
