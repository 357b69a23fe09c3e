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

from sketchconv.kernels.jit import jit

FAR = 1e300
PASSES = 10


@jit
def _buy(q0: Any, q1: Any, q2: Any, price: float, best: Any, starts: Any) -> Any:
    """Optimal partition at `price` per cluster: fill ``starts``, return the number of clusters."""
    cells = q0.size - 1
    best[0] = 0.0
    low = 0
    for end in range(1, cells + 1):
        e0, e1, e2 = q0[end], q1[end], q2[end]
        cheapest = FAR
        start = low
        for a in range(low, end):
            if best[a] >= cheapest:
                # The cost up to a only grows with a: nothing further on can be cheaper.
                break
            s = e1 - q1[a]
            cost = best[a] + ((e2 - q2[a]) - s * s / (e0 - q0[a]))
            if cost < cheapest:
                cheapest = cost
                start = a
        best[end] = cheapest + price
        starts[end] = start
        low = start
    count = 0
    end = cells
    while end > 0:
        end = starts[end]
        count += 1
    return count


@jit
def _trace(starts: Any, count: int, path: Any) -> None:
    end = starts.size - 1
    for j in range(count, 0, -1):
        path[j] = end
        end = starts[end]
    path[0] = 0


@jit
def _join(coarse: Any, fine: Any, surplus: int, count: int, bounds: Any) -> None:
    """Start on the `coarse` path and change to the `fine` one, which has `surplus` too many."""
    j = 0
    while j < count - 1 and not (
        coarse[j] <= fine[j + surplus] and fine[j + surplus + 1] <= coarse[j + 1]
    ):
        j += 1
    bounds[: j + 1] = coarse[: j + 1]
    for i in range(j + 1, bounds.size):
        bounds[i] = fine[i + surplus]


@jit
def priced_bounds(q0: Any, q1: Any, q2: Any, integral: float, bounds: Any) -> Any:
    """Fill ``bounds[0..k]`` with a near-optimal partition of the cells into k clusters.

    `integral` is that of density^(1/3): the high-resolution formula for the price of k clusters is
    ``integral**3 / (6 k^3)``. Prices are searched on the scale of the k that the formula gives
    them, on which the bought number is nearly linear. Needs more cells than k, each with mass.

    Returns True where a price buys exactly k: then the partition is optimal among these cells.
    """
    cells = q0.size - 1
    k = bounds.size - 1
    best = np.empty(cells + 1)
    starts = np.zeros(cells + 1, np.int64)
    below, above = np.zeros(cells + 1, np.int64), np.arange(cells + 1)
    below[1] = cells
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
        if many_at == 0.0:
            at *= max(k / count, 1.1)
        elif few_at == 0.0:
            at *= min(k / count, 0.9)
        else:
            share = (k - few) / (many - few) if attempt % 3 else 0.5
            at = few_at + (many_at - few_at) * share
    _join(below, above, many - k, few, bounds)
    return False
