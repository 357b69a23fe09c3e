"""Work spread over threads, results in order, a bounded number of them alive."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_order(items: Iterable[T], work: Callable[[T], R], threads: int) -> Iterator[tuple[T, R]]:
    """Yield ``(item, work(item))`` in the order of the items; `threads` of them run ahead.

    An exception of `work` is raised at its item.
    """
    pending: deque[tuple[T, Future[R]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="sketchconv-export") as pool:
        for item in items:
            pending.append((item, pool.submit(work, item)))
            if len(pending) > threads:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
