"""Decoding speed of a sketch against transformers' dense models, one token at a time.

Sketch, dense bfloat16 and dense float32 decode in turn in one process, greedily, the same number of
tokens from the same prompt; what counts is the ratio of the medians. Without `--dense` the dense
models are the sketch's own weights, decoded.

    python tests/bench/bench_decode.py [MODEL] [--dense FOLDER] [--tokens 48] [--threads 1]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent))
from models import CACHE, SMOLLM2, fetch

PROMPT = "Once upon a time there was a small village at the foot of a mountain, and"


def smollm2() -> Path:
    """SmolLM2 at 4 bits with 8-bit embeddings; made once."""
    import sketchconv
    from sketchconv.recipe import Recipe

    out = CACHE.parent / "bench-decode.sktch"
    if not out.exists():
        sketchconv.convert(fetch(SMOLLM2), out, Recipe(embed_bits=8))
    return out


def dense(sketch: Path, folder: Path | None, dtype: Any) -> Any:
    """The dense model: from `folder`, or the sketch decoded."""
    import sketchconv

    if folder is None:
        return sketchconv.load(sketch, dtype=dtype).dequantize(dtype)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def speed(model: Any, ids: Any, tokens: int) -> float:
    """Tokens per second of one greedy run of exactly `tokens` tokens."""
    started = time.perf_counter()
    model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return tokens / (time.perf_counter() - started)


def main() -> None:
    """Print tokens per second and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", help="a sketch [default: SmolLM2-135M]")
    parser.add_argument("--dense", type=Path, help="folder of the dense model")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    import torch

    import sketchconv
    from sketchconv.kernels.dispatch import choose

    torch.set_num_threads(options.threads)
    path = options.model or smollm2()
    ids = sketchconv.load_tokenizer(path)(PROMPT, return_tensors="pt").input_ids
    models = {
        "sketch": sketchconv.load(path),
        "bf16": dense(path, options.dense, torch.bfloat16),
        "fp32": dense(path, options.dense, torch.float32),
    }
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        speed(model, ids, 4)  # compiles kernels, warms caches
    for _ in range(options.rounds):
        for name, model in models.items():
            speeds[name].append(speed(model, ids, options.tokens))
    print(f"{path.name}, {options.threads} thread(s), kernels {choose().name}: {choose().reason}")
    for name, values in speeds.items():
        middle = statistics.median(values)
        print(f"{name:8} median {middle:7.1f} tokens/s, best {max(values):7.1f}")
    for name in ("bf16", "fp32"):
        pairs = [s / d for s, d in zip(speeds["sketch"], speeds[name], strict=True)]
        print(f"sketch / {name}: {statistics.median(pairs):.2f} times, worst {min(pairs):.2f}")


if __name__ == "__main__":
    main()
