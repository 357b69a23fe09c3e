"""Partitions by a banded dynamic program: near the optimum for a fraction of the exact cost.

Each of the k - 1 boundaries gets 16 candidate positions; the program finds the best combination.
The first round takes the candidates from a coarse grid at equal steps of density^(1/3) (the
asymptotically best spacing, Panter and Dite 1951), two clusters to either side; the following
rounds close in. Since all boundaries move at once, a round can carry a cluster from one end to
the other, where Lloyd's iteration would be stuck.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sketchconv.kernels.jit import jit

BAND = 16
HALF = 8
PER_CLUSTER = 4
FAR = np.float32(1e30)
TINY = np.float32(1e-30)


@jit
def spread_edges(density: Any, places: Any, edges: Any) -> None:
    """Cut the cumulated `density` of blocks into equal parts.

    `density[b]` belongs to the positions from ``places[b]`` to ``places[b + 1]``, evenly.
    ``edges[0]`` and ``edges[-1]`` become the ends.
    """
    total = 0.0
    for b in range(density.size):
        total += density[b]
    last = edges.size - 1
    block = 0
    before = 0.0
    for e in range(last):
        goal = total * e / last
        while block < density.size - 1 and before + density[block] < goal:
            before += density[block]
            block += 1
        inside = (goal - before) / density[block] if density[block] > 0.0 else 0.0
        begin, end = places[block], places[block + 1]
        edges[e] = min(begin + np.int64(min(inside, 1.0) * (end - begin) + 0.5), end)
    edges[0] = places[0]
    edges[last] = places[density.size]


@jit
def coarse_candidates(edges: Any, spots: Any) -> None:
    """Candidates of every boundary: 16 neighbouring edges around the boundary's share."""
    k = spots.shape[0] - 1
    last = edges.size - 1
    for j in range(1, k):
        for t in range(BAND):
            spots[j, t] = edges[min(max(PER_CLUSTER * j + t - HALF, 0), last)]


@jit
def near_candidates(bounds: Any, divisor: int, spots: Any) -> Any:
    """Candidates around `bounds`, a `divisor`-th of a cluster apart; returns the widest step."""
    k = spots.shape[0] - 1
    last = bounds[k]
    widest = 1
    for j in range(1, k):
        step = max((bounds[j + 1] - bounds[j - 1]) // (2 * divisor), 1)
        widest = max(widest, step)
        for t in range(BAND):
            spots[j, t] = min(max(bounds[j] + (t - HALF) * step, 0), last)
    return widest


@jit
def _load(p0: Any, p1: Any, p2: Any, spots: Any, side: Any) -> None:
    for t in range(BAND):
        spot = np.uint64(spots[t])
        side[0, t] = p0[spot]
        side[1, t] = p1[spot]
        side[2, t] = p2[spot]


@jit
def _centre(side: Any, local: Any, origin: Any, mean: float) -> None:
    """Moments about `mean`, counted from `origin`: small numbers, so float32 carries them."""
    o0, o1, o2 = origin
    s0, s1, s2 = side[0], side[1], side[2]
    a, b, c = local[0], local[1], local[2]
    for t in range(BAND):
        w = s0[t] - o0
        s = s1[t] - o1
        a[t] = np.float32(w)
        b[t] = np.float32(s - mean * w)
        c[t] = np.float32((s2[t] - o2) - mean * (s + s) + mean * mean * w)


@jit
def _min_plus(left: Any, right: Any, best: Any, fresh: Any, choice: Any) -> None:
    r0, r1, r2 = right[0], right[1], right[2]
    for b in range(BAND):
        fresh[b] = FAR + FAR
        choice[b] = 0
    for a in range(BAND):
        l0, l1, l2, base = left[0, a], left[1, a], left[2, a], best[a]
        for b in range(BAND):
            w = r0[b] - l0
            s = r1[b] - l1
            cost = (r2[b] - l2) - s * s / max(w, TINY)
            cost = base + (max(cost, np.float32(0.0)) if w >= 0 else FAR)
            if cost < fresh[b]:
                fresh[b] = cost
                choice[b] = a


@jit
def choose(p0: Any, p1: Any, p2: Any, spots: Any, bounds: Any, room: Any) -> None:
    """Best combination of the candidates `spots` ``[k + 1, 16]``, written to ``bounds[0..k]``."""
    sides, local, best, choices = room
    k = spots.shape[0] - 1
    spots[0, :] = 0
    spots[k, :] = p0.size - 1
    old, new = best[0], best[1]
    old[:] = 0
    left, right = sides[0], sides[1]
    _load(p0, p1, p2, spots[0], left)
    for j in range(1, k + 1):
        _load(p0, p1, p2, spots[j], right)
        origin = (left[0, HALF], left[1, HALF], left[2, HALF])
        w = right[0, HALF] - origin[0]
        mean = (right[1, HALF] - origin[1]) / w if w > 0.0 else 0.0
        _centre(left, local[0], origin, mean)
        _centre(right, local[1], origin, mean)
        _min_plus(local[0], local[1], old, new, choices[j])
        left, right = right, left
        old, new = new, old
    pick = 0
    bounds[k] = spots[k, 0]
    for j in range(k, 0, -1):
        pick = choices[j, pick]
        bounds[j - 1] = spots[j - 1, pick]


@jit
def make_room(k: int) -> Any:
    """Scratch of `choose` for k clusters."""
    return (
        np.zeros((2, 3, BAND)),
        np.zeros((2, 3, BAND), np.float32),
        np.zeros((2, BAND), np.float32),
        np.zeros((k + 1, BAND), np.int32),
    )
