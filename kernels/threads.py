"""Threads: spans of rows handed to kernels that run without the GIL.

Plain Python threads rather than Numba's: any thread of a caller may call a kernel (Numba's default
layer ends the process when two do), a fork is harmless, and compilation takes half the time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

SPANS_PER_THREAD = 8
SMALLEST_WORK = 1 << 16
# Elements per span: what a span allocates for itself must not cost more than it gains. With 16
# spans whatever the size, two threads took as long as one over 576 x 576 weights.
SMALLEST_SPAN = 1 << 17


def available_threads() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def for_spans(
    kernel: Callable[[int, int], object], rows: int, work: int, threads: int | None = None
) -> None:
    """Call ``kernel(begin, end)`` until the spans cover ``range(rows)``, on `threads` threads.

    Args:
        kernel: must write only to what belongs to its rows, so that no result depends on the spans.
        rows: number of rows.
        work: elements touched in all; below `SMALLEST_WORK` one thread does everything.
        threads: None means every core that the process may use.

    Raises:
        ValueError: `threads` is below 1.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}, must be at least 1")
    count = min(available_threads() if threads is None else threads, rows)
    if count <= 1 or work < SMALLEST_WORK:
        kernel(0, rows)
        return
    spans_wanted = min(count * SPANS_PER_THREAD, max(count, work // SMALLEST_SPAN))
    step = -(-rows // spans_wanted)
    with ThreadPoolExecutor(count) as pool:
        spans = [pool.submit(kernel, b, min(b + step, rows)) for b in range(0, rows, step)]
        for span in spans:
            span.result()
