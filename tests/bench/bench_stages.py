"""Where the time of a conversion goes, and how many threads it could keep busy.

A conversion reads and digests its source in one thread, and writes and digests its output in
another; all between them is spread over the other threads. So the two serial parts bound what
threads can reach, and what more processes could. Each part is measured as CPU time of its thread,
so that a busy machine does not matter; one thread does the spread part here.

    python tests/bench/bench_stages.py --model FOLDER --bits 4 --weighting moments
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sketchconv.chunks import SourceDigest
from sketchconv.formats.part import Part
from sketchconv.job import prepare
from sketchconv.pipeline import run
from sketchconv.recipe import Recipe, SketchSpec
from sketchconv.sources.matrices import Matrices

READS = ((Matrices, "rows", "read"), (SourceDigest, "update", "digest of the source"))
WRITES = ((Part, "append", "write and digest of the output"),)
SPREAD = "everything that threads share, and Python between"


class Clock:
    """CPU seconds of methods, by label."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def watch(self, owner: type, name: str, label: str) -> None:
        """Measure a method from here on."""
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.thread_time()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[label] += time.thread_time() - begin

        setattr(owner, name, timed)


def measure(model: str, recipe: Recipe, clock: Clock) -> dict[str, float]:
    """CPU nanoseconds per value of the model, by part."""
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(model, Path(folder) / "m.sktch", recipe)
        values = sum(step.parameters for step in job.plan.steps)
        clock.seconds.clear()
        begin = time.thread_time()
        report = run(job, threads=1)
        main = time.thread_time() - begin - report.compile_seconds
    parts = dict(clock.seconds)
    parts[SPREAD] = main - sum(parts[label] for *_, label in WRITES)
    return {label: 1e9 * seconds / values for label, seconds in parts.items()}


def main() -> None:
    """Measure, after one run that has everything compiled and in the page cache."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--weighting", default="moments")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    given = parser.parse_args()
    recipe, clock = Recipe(SketchSpec(given.bits), weighting=given.weighting), Clock()
    for owner, name, label in (*READS, *WRITES):
        clock.watch(owner, name, label)
    measure(given.model, recipe, clock)
    parts = measure(given.model, recipe, clock)
    for label, cost in parts.items():
        print(f"{label}: {cost:.2f} ns per value")
    reads = sum(parts[label] for *_, label in READS)
    writes = sum(parts[label] for *_, label in WRITES)
    total = sum(parts.values())
    for threads in given.threads:
        bound = max(reads, writes + parts[SPREAD] / threads, total / threads)
        print(
            f"{threads} threads: at best {total:.1f} / {bound:.1f} ns = {total / bound:.2f} times"
            f" one core ({100 * total / bound / threads:.0f} % of the cores)"
        )


if __name__ == "__main__":
    main()
