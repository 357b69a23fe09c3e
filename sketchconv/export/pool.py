"""Work spread over threads, results in order, a bounded number of them alive."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_order(
    items: Iterable[T],
    work: Callable[[T], R],
    threads: int,
    cost: Callable[[T], int] = lambda _: 0,
    budget: int = 0,
) -> Iterator[tuple[T, R]]:
    """Yield ``(item, work(item))`` in the order of the items; `threads` of them run ahead.

    Fewer do where their costs together would pass the budget; one always does. An exception of
    `work` is raised at its item.
    """
    pending: deque[tuple[T, Future[R]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="sketchconv-export") as pool:
        used = 0
        for item in items:
            while pending and (len(pending) > threads or used + cost(item) > budget):
                first, future = pending.popleft()
                used -= cost(first)
                yield first, future.result()
            used += cost(item)
            pending.append((item, pool.submit(work, item)))
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
