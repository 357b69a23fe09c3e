"""Where the time of a conversion goes, and how many threads it could keep busy.

A conversion reads and digests its source in one thread, and writes and digests its output in
another; all between them is spread over the other threads. So the two serial parts bound what
threads can reach. Several processes (`--jobs`) have both parts each, and one more pass over the
source, in one thread for all of them. Each part is measured as CPU time of its thread,
so that a busy machine does not matter; one thread does the spread part here. What is said of
several processes is computed from these times, for disks and memory that keep up, equal shares.

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
from sketchconv.parallel.scout import Scout
from sketchconv.pipeline import run
from sketchconv.recipe import Recipe, SketchSpec
from sketchconv.sources.matrices import Matrices
from sketchconv.worker import ordered_steps

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


def pass_ahead(model: str, recipe: Recipe) -> float:
    """CPU nanoseconds per value of the pass that makes column weights for several processes."""
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(model, Path(folder) / "m.sktch", recipe)
        steps = ordered_steps(job)
        scout = Scout(
            job, [s for s in steps if s.name in set(job.moments.order)], {}, job.budget, 0
        )
        begin = time.thread_time()
        scout._run()
        seconds = time.thread_time() - begin
        job.source.close()
    return 1e9 * seconds / sum(step.parameters for step in job.plan.steps)


def bound(parts: dict[str, float], ahead: float, threads: int, jobs: int) -> float:
    """Nanoseconds per value that so many threads in so many processes take at least."""
    reads = sum(parts[label] for *_, label in READS)
    writes = sum(parts[label] for *_, label in WRITES)
    total = sum(parts.values())
    if jobs == 1:
        return max(reads, writes + parts[SPREAD] / threads, total / threads)
    each = max(reads, writes + parts[SPREAD] * jobs / threads)
    return max(ahead, each / jobs, (total + ahead) / threads)


def main() -> None:
    """Measure, after one run that has everything compiled and in the page cache."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--weighting", default="moments")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    given = parser.parse_args()
    recipe, clock = Recipe(SketchSpec(given.bits), weighting=given.weighting), Clock()
    for owner, name, label in (*READS, *WRITES):
        clock.watch(owner, name, label)
    measure(given.model, recipe, clock)
    parts = measure(given.model, recipe, clock)
    for label, cost in parts.items():
        print(f"{label}: {cost:.2f} ns per value")
    pass_ahead(given.model, recipe)
    ahead = pass_ahead(given.model, recipe)
    print(f"the pass ahead of several processes: {ahead:.2f} ns per value")
    total = sum(parts.values())
    for threads in given.threads:
        for jobs in [jobs for jobs in given.jobs if jobs <= threads]:
            least = bound(parts, ahead, threads, jobs)
            print(
                f"{threads} threads, {jobs} processes: at best {total:.1f} / {least:.2f} ns = "
                f"{total / least:.2f} times one core"
                f" ({100 * total / least / threads:.0f} % of the cores)"
            )


if __name__ == "__main__":
    main()
