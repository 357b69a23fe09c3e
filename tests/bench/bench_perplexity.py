"""What a sketch without any data costs in perplexity, on SmolLM2-135M-Instruct.

The dense model is that of dithered.py.

    python tests/bench/bench_perplexity.py --text wikitext2-test.txt [--windows 4] [--bits 4]
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))
from dithered import CACHE, dense_model

WINDOW = 1024


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
    """Print the perplexity of the dense model and of sketches by all weightings."""
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

    dense = dense_model()
    tokenizer = AutoTokenizer.from_pretrained(dense)
    text = options.text.read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer(text)["input_ids"][: options.windows * WINDOW])
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    print(
        f"dense bf16: perplexity {perplexity(model, tokens, options.windows):.2f} "
        f"({options.windows} windows of {WINDOW} tokens)"
    )
    for weighting in ("equal", "moments", "covariances"):
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
