"""A standing crew of threads for kernels that take less than a millisecond.

`threads.for_spans` starts threads for each call, which suits work of seconds. Here the threads
stay, and the caller works too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="sketchconv")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a fork has no threads but its own


def share(kernel: Callable[[int, int], object], rows: int, threads: int) -> None:
    """Call ``kernel(begin, end)`` on `threads` even spans of ``range(rows)`` at the same time.

    `kernel` must release the GIL and write only to what belongs to its rows. No span runs on after
    this returns or raises, an interrupt included; since a second interrupt can end even that wait,
    `kernel` must also hold the arrays to which it has only addresses.
    """
    threads = min(threads, rows)
    if threads <= 1:
        kernel(0, rows)
        return
    edges = [rows * i // threads for i in range(threads + 1)]
    pool = _pool(threads - 1)
    spans: list[Future[object]] = []
    try:
        for i in range(1, threads):
            spans.append(pool.submit(kernel, edges[i], edges[i + 1]))
        kernel(edges[0], edges[1])
        for span in spans:
            span.result()
    except BaseException:
        wait(spans)
        raise
