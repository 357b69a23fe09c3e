"""The exact optimum: a dynamic program over sorted atoms, by divide and conquer.

The best start of the last interval moves right as its end moves right (the interval cost satisfies
the quadrangle inequality), so each layer costs O(n log n): Wang and Song (2011), Gronlund et al.
(2017).
"""

from __future__ import annotations

from typing import Any

from sketchconv.kernels.jit import inner

FAR = 1e300


@inner
def _best_start(best: Any, p0: Any, p1: Any, p2: Any, low: int, high: int, end: int) -> Any:
    """Cheapest ``best[a] + cost(a, end)`` for a in ``[low, high]``, and its lowest a."""
    e0, e1, e2 = p0[end], p1[end], p2[end]
    cheapest = FAR
    start = low
    b, q0, q1, q2 = best[low:], p0[low:], p1[low:], p2[low:]
    for i in range(high - low + 1):
        w = e0 - q0[i]
        s = e1 - q1[i]
        cost = b[i] + ((e2 - q2[i]) - s * s / w)
        if cost < cheapest:
            cheapest = cost
            start = low + i
    return cheapest, start


@inner
def _layer(
    best: Any, fresh: Any, starts: Any, p0: Any, p1: Any, p2: Any, j: int, first: int, last: int
) -> None:
    """The j-th interval: fill ``fresh[e]`` and ``starts[e]`` for the ends e in [first, last]."""
    count = last - first + 1
    step = 1
    while step * 2 <= count:
        step *= 2
    while step:
        for i in range(step - 1, count, 2 * step):
            end = first + i
            low = starts[end - step] if i >= step else j - 1
            high = min(starts[end + step] if i + step < count else end - 1, end - 1)
            fresh[end], starts[end] = _best_start(best, p0, p1, p2, low, high, end)
        step //= 2


@inner
def exact_bounds(p0: Any, p1: Any, p2: Any, bounds: Any, costs: Any, starts: Any) -> None:
    """Fill ``bounds[0..k]`` with the optimal partition; needs more than k atoms.

    `costs` float64 ``[2, atoms + 1]`` and `starts` int32 ``[k + 1, atoms + 1]`` are scratch.
    """
    n = p0.size - 1
    k = bounds.size - 1
    best, fresh = costs[0], costs[1]
    for end in range(n + 1):
        best[end] = FAR
        fresh[end] = FAR
    for end in range(1, n + 1):
        best[end] = p2[end] - p1[end] * p1[end] / p0[end]
    for j in range(2, k + 1):
        first = n if j == k else j
        _layer(best, fresh, starts[j], p0, p1, p2, j, first, n - (k - j))
        best, fresh = fresh, best
    bounds[0], bounds[k] = 0, n
    for j in range(k, 1, -1):
        bounds[j - 1] = starts[j, bounds[j]]
