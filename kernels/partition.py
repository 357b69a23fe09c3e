"""Partitions by a banded dynamic program: near the optimum for a fraction of the exact cost.

Each of the k - 1 boundaries gets eight candidate positions, and the program finds the best
combination. The first round takes the candidates from a coarse grid at equal steps of
density^(1/3) (asymptotically the best spacing: Panter and Dite 1951), one cluster to either side;
the following rounds close in. Since all boundaries move at once, a round can carry a cluster from
one end to the other, where Lloyd's iteration would be stuck.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sketchconv.kernels.banded import BAND, banded_step
from sketchconv.kernels.jit import inner

HALF = BAND // 2
PER_CLUSTER = 4


class Room(NamedTuple):
    """Scratch of `choose` for k clusters."""

    spots: NDArray[np.int64]  # [k + 1, 8] candidate positions
    side: NDArray[np.float64]  # [3, 8] prefix sums at the candidates of one boundary
    best: NDArray[np.float32]  # [8] cost up to them
    choices: NDArray[np.int32]  # [k + 1, 8] best candidate of the boundary before


def make_room(k: int) -> Room:
    """A `Room` for k clusters."""
    return Room(
        np.zeros((k + 1, BAND), np.int64),
        np.zeros((3, BAND)),
        np.zeros(BAND, np.float32),
        np.zeros((k + 1, BAND), np.int32),
    )


@inner
def near_cube_root(x: Any) -> Any:
    """x^(21/64), for x^(1/3): products of square roots, which round alike on every machine.

    The cube root of a mathematical library does not; and it only spaces candidates, for which an
    exponent 1.6 % off is as good.
    """
    fourth = np.sqrt(np.sqrt(x))
    sixteenth = np.sqrt(np.sqrt(fourth))
    return fourth * sixteenth * np.sqrt(np.sqrt(sixteenth))


@inner
def spread_edges(density: Any, places: Any, edges: Any) -> None:
    """Cut the cumulated `density` of blocks into equal parts.

    ``density[b]`` belongs to the positions from ``places[b]`` to ``places[b + 1]``, evenly. The
    first and last edge are the ends.
    """
    total = 0.0
    for b in range(density.size):
        total += density[b]
    last = edges.size - 1
    step = total / last
    block = 0
    before = 0.0
    for e in range(1, last):
        goal = step * e
        while block < density.size - 1 and before + density[block] < goal:
            before += density[block]
            block += 1
        inside = (goal - before) / density[block] if density[block] > 0.0 else 0.0
        begin, end = places[block], places[block + 1]
        edges[e] = begin + np.int64(min(inside, 1.0) * (end - begin) + 0.5)
    edges[0] = places[0]
    edges[last] = places[density.size]


@inner
def drop_empty(edges: Any) -> Any:
    """Move the distinct ones of the ascending `edges` to the front; returns the cells they cut."""
    cells = 0
    for e in range(1, edges.size):
        if edges[e] > edges[cells]:
            cells += 1
            edges[cells] = edges[e]
    return cells


@inner
def choose(p0: Any, p1: Any, p2: Any, bounds: Any, room: Any) -> None:
    """Best combination of the candidates in ``room.spots``, written to ``bounds[0..k]``.

    `p0`, `p1`, `p2` are prefix sums of mass, first and second moment.
    """
    spots, choices = room.spots, room.choices
    k = spots.shape[0] - 1
    for t in range(BAND):
        spots[0, t] = 0
        spots[k, t] = p0.size - 1
    side, best = room.side, room.best
    for t in range(BAND):
        best[t] = 0
        side[0, t] = 0.0
        side[1, t] = 0.0
        side[2, t] = 0.0
    for j in range(1, k + 1):
        banded_step(p0, p1, p2, spots[j], side, best, choices[j])
    pick = 0
    bounds[k] = spots[k, 0]
    for j in range(k, 0, -1):
        pick = choices[j, pick]
        bounds[j - 1] = spots[j - 1, pick]


@inner
def choose_edges(p0: Any, p1: Any, p2: Any, edges: Any, bounds: Any, room: Any) -> None:
    """A round on the coarse grid ``edges[0..4 k]``."""
    k = bounds.size - 1
    for j in range(1, k):
        near = edges[PER_CLUSTER * j - HALF : PER_CLUSTER * j + HALF]
        for t in range(BAND):
            room.spots[j, t] = near[t]
    choose(p0, p1, p2, bounds, room)


@inner
def choose_near(p0: Any, p1: Any, p2: Any, divisor: int, bounds: Any, room: Any) -> Any:
    """A round around `bounds`, a `divisor`-th of a cluster apart; returns the widest step."""
    k = bounds.size - 1
    last = bounds[k]
    widest = 1.0
    inverse = 0.5 / divisor
    for j in range(1, k):
        step = max((bounds[j + 1] - bounds[j - 1]) * inverse, 1.0)
        widest = max(widest, step)
        middle = bounds[j] + 0.5
        for t in range(BAND):
            room.spots[j, t] = np.int64(min(max(middle + (t - HALF) * step, 0.0), last))
    choose(p0, p1, p2, bounds, room)
    return widest


@inner
def split(p0: Any, p1: Any, p2: Any, bounds: Any) -> None:
    """The best partition into two, by trying every boundary: outliers give it several optima."""
    last = p0.size - 1
    cheapest = 1e300
    for b in range(1, last):
        left, right = p0[b], p0[last] - p0[b]
        s = p1[last] - p1[b]
        gain = p1[b] * p1[b] / max(left, 1e-300) + s * s / max(right, 1e-300)
        if p2[last] - gain < cheapest:
            cheapest = p2[last] - gain
            bounds[1] = b
    bounds[0], bounds[2] = 0, last
