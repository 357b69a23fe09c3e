"""Many tasks over one sketch: a mixed batch against one task's, switching, memory.

The model is loaded once and gets `--tasks` adapters whose LUTs are those of the base, moved at
random. A batch of 4 samples of 4 tasks takes turns with the same batch of one task: a decoding step
(one token each, after a prompt), and the reading of a short prompt. What counts are medians.

    python tests/bench/bench_tasks.py SKETCH [--tasks 10] [--rounds 9] [--threads 1] [--embeddings]

Tasks change the LUTs of the linear layers; with --embeddings those of the embeddings as well, and
with them a tied head.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))
from timing import Contender, compete, ratio

SAMPLES = 4
CONTEXT = 32


def resident() -> int:
    """Bytes of anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/self/status has no RssAnon")


def moved(model: Any, seed: int, embeddings: bool) -> dict[str, Any]:
    """The LUTs of a task: the base's, moved by a hundredth of their spread."""
    import torch

    from sketchconv.adapters.base import base_of
    from sketchconv.runtime.modules import SketchEmbedding

    generator = torch.Generator().manual_seed(seed)
    base = base_of(model)
    made = {}
    for name in base.paths:
        if isinstance(base.module(model, name), SketchEmbedding) and not embeddings:
            continue
        lut = base.module(model, name).lut_of("__base__").detach()
        noise = 0.01 * lut.float().std() * torch.randn(lut.shape, generator=generator)
        made[name] = (lut.float() + noise).to(lut.dtype)
    return made


def steps(model: Any, names: list[str], length: int) -> Callable[[], object]:
    """A forward of `length` new tokens per sample; for one token, after a context."""
    import torch

    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    ids = torch.randint(5, min(1000, vocabulary), (SAMPLES, CONTEXT + length), generator=generator)
    more = {"adapter_names": names}
    if length > 1:
        return lambda: model(ids[:, :length], logits_to_keep=1, **more)
    with torch.inference_mode():
        cache = model(ids[:, :CONTEXT], use_cache=True, **more).past_key_values

    def run() -> None:
        model(ids[:, CONTEXT:], past_key_values=cache, **more)
        cache.crop(-1)

    return run


def modules(model: Any, names: list[str], tokens: int) -> tuple[Contender, Contender]:
    """All sketched products of a forward and nothing else, for one task and for several."""
    import torch

    from sketchconv.adapters import batch
    from sketchconv.runtime.modules import SketchLinear

    found = [m for m in model.modules() if isinstance(m, SketchLinear)]
    inputs = {m.columns: torch.randn(SAMPLES, tokens, m.columns, dtype=model.dtype) for m in found}

    def run(chosen: list[str]) -> None:
        with batch.use(tuple(chosen)):
            for module in found:
                module(inputs[module.columns])

    what = f"products, {tokens} token{'s' * (tokens > 1)} each"
    one = [names[0]] * SAMPLES
    return Contender(f"{what}, one task", lambda: run(one)), Contender(
        f"{what}, {SAMPLES} tasks", lambda: run(names)
    )


def pairs(model: Any, names: list[str], prompts: list[int]) -> list[tuple[Contender, Contender]]:
    """Contenders of one task and of several, for each kind of work."""
    found = [modules(model, names, 1), modules(model, names, 16)]
    for length in (1, *prompts):
        what = "decoding step" if length == 1 else f"prompt of {length}"
        one, all_of_them = (steps(model, each, length) for each in ([names[0]] * SAMPLES, names))
        found.append(
            (
                Contender(f"{what}, one task", one),
                Contender(f"{what}, {SAMPLES} tasks", all_of_them),
            )
        )
    return found


def switching(model: Any, names: list[str], rounds: int) -> None:
    """How long `set_adapter` takes, and the first forward after it against the next."""
    import torch

    ids = torch.tensor([[5]])
    spent: dict[str, list[float]] = {"set_adapter": [], "first forward": [], "second forward": []}
    for turn in range(2 * rounds):
        marks = [time.perf_counter()]
        model.set_adapter(names[turn % len(names)])
        marks.append(time.perf_counter())
        for _ in range(2):
            model(ids)
            marks.append(time.perf_counter())
        for (_, times), start, end in zip(spent.items(), marks[:-1], marks[1:], strict=True):
            times.append(end - start)
    medians = {key: sorted(times)[len(times) // 2] for key, times in spent.items()}
    print(", ".join(f"{key} {1000 * value:.2f} ms" for key, value in medians.items()))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sketch", type=Path)
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prompts", type=int, nargs="*", default=[16, 128])
    parser.add_argument("--embeddings", action="store_true", help="tasks change these LUTs too")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    import torch

    import sketchconv

    torch.set_num_threads(options.threads)
    model: Any = sketchconv.load(options.sketch)
    with torch.inference_mode():
        model(torch.tensor([[5]]))
    gc.collect()
    before, luts = resident(), 0
    for number in range(options.tasks):
        luts += model.load_adapter(moved(model, number, options.embeddings), f"task{number}").nbytes
        gc.collect()
    grown = resident() - before
    print(f"memory of {options.tasks} tasks / their LUTs: " + ratio(grown, luts, "MB", scale=1e-6))
    size = options.sketch.stat().st_size if options.sketch.is_file() else 0
    print(f"one task: {luts / options.tasks / 1e6:.1f} MB, the sketch {size / 1e6:.1f} MB")
    names = [f"task{number}" for number in range(SAMPLES)]
    with torch.inference_mode():
        switching(model, names, options.rounds)
        found = pairs(model, names, options.prompts)
        compete([contender for pair in found for contender in pair], options.rounds)
    for one, several in found:
        print(f"{several.name}: " + ratio(several.median, one.median, "ms", scale=1000.0, digits=2))


if __name__ == "__main__":
    main()
