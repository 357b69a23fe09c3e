"""Partitions into many clusters: a dynamic program that buys clusters at a price.

With a price per cluster instead of their number fixed, one pass over the cells finds the global
optimum; the dearer a cluster, the fewer are bought. A few passes bracket the price that buys k
(Aggarwal, Schieber and Tokuyama 1994). Two solutions that bracket k are joined where a cluster of
the coarser contains one of the finer, which by the quadrangle inequality loses nothing at equal
prices.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sketchconv.kernels.jit import inner

FAR = 1e300
PASSES = 10


@inner
def _total(q0: Any, q1: Any, q2: Any, best: Any, start: Any, end: Any) -> Any:
    s = end[1] - q1[start]
    return best[start] + ((end[2] - q2[start]) - s * s / (end[0] - q0[start]))


@inner
def _buy(q0: Any, q1: Any, q2: Any, price: float, best: Any, starts: Any) -> Any:
    """Optimal partition at `price` per cluster: fill ``starts``, return the number of clusters.

    The best start only moves right as the end does, and mostly by less than four cells: those are
    priced without a branch. The cost up to a start only grows with it, which ends the search.
    """
    cells = q0.size - 1
    for i in range(cells + 1):
        best[i] = FAR
    best[0] = 0.0
    low = 0
    for i in range(1, cells + 1):
        end = (q0[i], q1[i], q2[i])
        a, b = min(low + 1, cells), min(low + 2, cells)
        c = min(low + 3, cells)
        first = _total(q0, q1, q2, best, np.uint64(low), end)
        second = _total(q0, q1, q2, best, np.uint64(a), end)
        third = _total(q0, q1, q2, best, np.uint64(b), end)
        fourth = _total(q0, q1, q2, best, np.uint64(c), end)
        start = a if second < first else low
        cheapest = second if second < first else first
        other = c if fourth < third else b
        cheaper = fourth if fourth < third else third
        start = other if cheaper < cheapest else start
        cheapest = cheaper if cheaper < cheapest else cheapest
        for further in range(low + 4, i):
            if best[further] >= cheapest:
                break
            cost = _total(q0, q1, q2, best, np.uint64(further), end)
            if cost < cheapest:
                cheapest = cost
                start = further
        best[i] = cheapest + price
        starts[i] = start
        low = start
    count = 0
    place = cells
    while place > 0:
        place = starts[place]
        count += 1
    return count


@inner
def _trace(starts: Any, count: int, path: Any) -> None:
    end = starts.size - 1
    for j in range(count, 0, -1):
        path[j] = end
        end = starts[end]
    path[0] = 0


@inner
def _join(coarse: Any, fine: Any, surplus: int, count: int, bounds: Any) -> None:
    """Start on the `coarse` path and change to the `fine` one, which has `surplus` too many."""
    j = 0
    while j < count - 1 and not (
        coarse[j] <= fine[j + surplus] and fine[j + surplus + 1] <= coarse[j + 1]
    ):
        j += 1
    for i in range(j + 1):
        bounds[i] = coarse[i]
    for i in range(j + 1, bounds.size):
        bounds[i] = fine[i + surplus]


@inner
def priced_bounds(
    q0: Any, q1: Any, q2: Any, integral: float, close: int, bounds: Any, best: Any, paths: Any
) -> Any:
    """Fill ``bounds[0..k]`` with a near-optimal partition of the cells into k clusters.

    `integral` is that of density^(1/3): the high-resolution formula for the price of k clusters is
    ``integral**3 / (6 k^3)``. Prices are searched on the scale of the k that the formula gives
    them, on which the bought number is nearly linear. Needs more cells than k, each with mass.

    A bracket of at most `close` clusters is joined at once.
    `best` float64 ``[cells + 1]`` and `paths` int64 ``[3, cells + 1]`` are scratch.

    Returns True where a price buys exactly k: then the partition is optimal among these cells.
    """
    cells = q0.size - 1
    k = bounds.size - 1
    starts, below, above = paths[0, : cells + 1], paths[1], paths[2]
    for i in range(cells + 1):
        above[i] = i
    below[0], below[1] = 0, cells
    few, few_at = 1, 0.0
    many, many_at = cells, 0.0
    at = float(k)
    for attempt in range(PASSES):
        ratio = integral / at
        count = _buy(q0, q1, q2, ratio * ratio * ratio / 6.0, best, starts)
        if count == k:
            _trace(starts, count, bounds)
            return True
        if count < k:
            few, few_at = count, at
            _trace(starts, count, below)
        else:
            many, many_at = count, at
            _trace(starts, count, above)
        if many - few <= close:
            break
        if many_at == 0.0:
            at *= max(k / count, 1.1)
        elif few_at == 0.0:
            at *= min(k / count, 0.9)
        else:
            share = (k - few) / (many - few) if attempt % 3 else 0.5
            at = few_at + (many_at - few_at) * share
    _join(below, above, many - k, few, bounds)
    return False
