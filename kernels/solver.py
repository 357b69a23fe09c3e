"""The solver: one LUT and its codes per (row, group), near the weighted k-means optimum."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sketchconv.kernels.atoms import (
    DIGITS,
    atom_density,
    atom_means,
    gather_atoms,
    sort_keys,
    sum_atoms,
)
from sketchconv.kernels.coding import (
    count_above,
    fill_thresholds,
    keep_first,
    round_entries,
    squares,
    walk_codes,
)
from sketchconv.kernels.exact import exact_bounds
from sketchconv.kernels.histogram import (
    BLOCKS,
    MOST_BLOCKS,
    SPREAD,
    bin_density,
    bin_means,
    fill_bins,
    find_bins,
    mean_deviation,
    rough_mean,
    sum_bins,
)
from sketchconv.kernels.jit import inner, jit
from sketchconv.kernels.lagrange import priced_bounds
from sketchconv.kernels.partition import (
    PER_CLUSTER,
    Room,
    choose_edges,
    choose_near,
    drop_empty,
    make_room,
    split,
    spread_edges,
)

MOST_BINNED = 16
SHORTEST_BINNED = 256
LONG = 2048
LEAST_USED = 5  # an outlier or few distinct values leave less than this part of the bins used
SMALLEST, LARGEST = np.float32(1e-30), np.float32(1e30)
CELLS = 6
PER_BLOCK = 8


class Scratch(NamedTuple):
    """Arrays that a thread uses again for every group of n values and k entries."""

    room: Room
    bounds: NDArray[np.int64]  # [k + 1]
    entries: NDArray[np.float64]  # [k]
    prefix: NDArray[np.float64]  # [3, max(n, bins) + 1]
    density: NDArray[np.float64]  # [blocks]
    places: NDArray[np.int64]  # [blocks + 1]
    edges: NDArray[np.int64]  # [cells + 1]
    bins: NDArray[np.uint16]  # [n]
    histogram: NDArray[np.float64]  # [2, bins]
    keys: NDArray[np.uint64]  # [2, n]
    counts: NDArray[np.int64]  # [4, 256]
    atoms: NDArray[np.float64]  # [2, n] values, masses
    cells: NDArray[np.float64]  # [3, cells + 1] prefix sums at the edges
    costs: NDArray[np.float64]  # [2, max(n, cells) + 1]
    paths: NDArray[np.int64]  # [3, max(n, cells) + 1]
    starts: NDArray[np.int32]  # [k + 1, n + 1] in exact mode
    gaps: NDArray[np.float32]  # [n]
    words: NDArray[np.uint32]  # [k] rounded entries, and the same
    cast: NDArray[np.float32]  # as float32
    thresholds: NDArray[np.float32]  # [k, but at least 8]


def make_scratch(n: int, k: int, exact: bool) -> Scratch:
    """A `Scratch` for groups of n values and k entries."""
    bins = 1024 if n >= LONG else 512
    blocks = max(MOST_BLOCKS, n // PER_BLOCK + 1)
    cells = CELLS * k
    words = np.zeros(k, np.uint32)
    return Scratch(
        room=make_room(k),
        bounds=np.zeros(k + 1, np.int64),
        entries=np.zeros(k),
        prefix=np.zeros((3, max(n, bins) + 1)),
        density=np.zeros(blocks),
        places=np.zeros(blocks + 1, np.int64),
        edges=np.zeros(cells + 1, np.int64),
        bins=np.zeros(n, np.uint16),
        histogram=np.zeros((2, bins)),
        keys=np.zeros((2, n), np.uint64),
        counts=np.zeros((4, DIGITS), np.int64),
        atoms=np.zeros((2, n)),
        cells=np.zeros((3, cells + 1)),
        costs=np.zeros((2, max(n, cells) + 1)),
        paths=np.zeros((3, max(n, cells) + 1), np.int64),
        starts=np.zeros((k + 1, n + 1) if exact else (0, 0), np.int32),
        gaps=np.zeros(n, np.float32),
        words=words,
        cast=words.view(np.float32),
        thresholds=np.zeros(max(k, 8), np.float32),
    )


@inner
def _near_bins(p0: Any, p1: Any, p2: Any, uneven: bool, s: Any) -> None:
    """Near-optimal partition of the bins.

    Where few columns carry the weight (`uneven`) the coarse grid follows them more closely, and
    one more round repairs what it misses.
    """
    k = s.entries.size
    edges = s.edges[: PER_CLUSTER * k + 1]
    density = s.density[: MOST_BLOCKS if uneven else BLOCKS]
    bin_density(p0, p1, density, s.places)
    spread_edges(density, s.places, edges)
    choose_edges(p0, p1, p2, edges, s.bounds, s.room)
    if uneven:
        choose_near(p0, p1, p2, 2, s.bounds, s.room)
    choose_near(p0, p1, p2, 8, s.bounds, s.room)
    choose_near(p0, p1, p2, 32, s.bounds, s.room)


@inner
def _solve_bins(x: Any, mass: Any, weighted: bool, uneven: bool, s: Any) -> Any:
    """Fill ``s.entries`` by way of a histogram; False where its resolution would not do."""
    k = s.entries.size
    centre = rough_mean(x)
    scale = np.float32(SPREAD * mean_deviation(x, mass, centre))
    if not (SMALLEST < scale < LARGEST and abs(centre) < LARGEST):
        return False
    count = s.histogram.shape[1]
    p0, p1, p2 = s.prefix[0, : count + 1], s.prefix[1, : count + 1], s.prefix[2, : count + 1]
    find_bins(x, centre, scale, count, s.bins)
    fill_bins(x, mass, weighted, centre, s.bins, s.histogram)
    used = sum_bins(s.histogram, 1.0 / np.float64(scale), p0, p1, p2)
    if used < max(4 * k, count // LEAST_USED):
        return False
    if k == 2:
        split(p0, p1, p2, s.bounds)
    else:
        _near_bins(p0, p1, p2, uneven, s)
    bin_means(p0, p1, np.float64(centre), np.float64(scale), s.bounds, s.entries)
    return True


@inner
def _near_bounds(values: Any, p0: Any, p1: Any, p2: Any, s: Any) -> None:
    """Near-optimal partition of sorted atoms, on cells of a sixth of a cluster if many."""
    k = s.entries.size
    blocks = max(values.size // PER_BLOCK, 1)
    density, places = s.density[:blocks], s.places[: blocks + 1]
    cells = CELLS * k
    integral = atom_density(values, p0, p1, cells, density, places)
    edges = s.edges[: cells + 1]
    if values.size > cells:
        spread_edges(density, places, edges)
        cells = drop_empty(edges)
    if values.size <= cells or cells <= k:
        if priced_bounds(p0, p1, p2, integral, s.bounds, s.costs[0], s.paths):
            return
    else:
        q = s.cells[:, : cells + 1]
        for e in range(cells + 1):
            q[0, e] = p0[edges[e]]
            q[1, e] = p1[edges[e]]
            q[2, e] = p2[edges[e]]
        priced_bounds(q[0], q[1], q[2], integral, s.bounds, s.costs[0], s.paths)
        for j in range(k + 1):
            s.bounds[j] = edges[s.bounds[j]]
    for divisor in (8, 16, 32):
        if choose_near(p0, p1, p2, divisor, s.bounds, s.room) <= 1.0:
            break


@inner
def _solve_atoms(x: Any, words: Any, mass: Any, weighted: bool, exact: bool, s: Any) -> None:
    """Fill ``s.entries`` by way of the sorted distinct values."""
    k = s.entries.size
    values, masses = s.atoms[0], s.atoms[1]
    sort_keys(words, s.keys[0], s.keys[1], s.counts)
    atoms = gather_atoms(x, mass, weighted, s.keys[0], values, masses, k)
    if atoms <= k:
        for j in range(k + 1):
            s.bounds[j] = min(j, atoms)
    else:
        p0, p1, p2 = s.prefix[0, : atoms + 1], s.prefix[1, : atoms + 1], s.prefix[2, : atoms + 1]
        sum_atoms(values[:atoms], masses[:atoms], p0, p1, p2)
        if exact:
            exact_bounds(p0, p1, p2, s.bounds, s.costs, s.starts)
        else:
            _near_bounds(values[:atoms], p0, p1, p2, s)
    atom_means(values, masses, s.bounds, s.entries)


@jit
def solve_span(
    weight: Any,
    words: Any,
    mass: Any,
    weighted: bool,
    uneven: Any,
    exact: bool,
    kind: int,
    codes: Any,
    luts: Any,
    error: Any,
    norm: Any,
    scratch: Any,
    begin: int,
    end: int,
) -> None:
    """Solve the rows from `begin` to `end`; `words` is the uint32 view of `weight`.

    `mass` is float32 ``[groups, columns / groups]`` with mean 1 per group, `uneven` a flag per
    group; `luts` float32 ``[rows, groups, k]`` receives the rounded entries.
    """
    groups, k = luts.shape[1], luts.shape[2]
    size = weight.shape[1] // groups
    binned = not exact and k <= MOST_BINNED and size >= SHORTEST_BINNED
    cast, thresholds = scratch.cast, scratch.thresholds
    for row in range(begin, end):
        error[row] = 0.0
        norm[row] = 0.0
        for group in range(groups):
            first, last = group * size, (group + 1) * size
            x, code = weight[row, first:last], codes[row, first:last]
            by_bins = binned and _solve_bins(x, mass[group], weighted, uneven[group], scratch)
            if not by_bins:
                _solve_atoms(x, words[row, first:last], mass[group], weighted, exact, scratch)
            round_entries(scratch.entries, kind, cast, scratch.words)
            for i in range(k):
                luts[row, group, i] = cast[i]
            fill_thresholds(cast, thresholds)
            if by_bins:
                count_above(x, thresholds, code)
            else:
                walk_codes(x, scratch.keys[0], thresholds, code)
            keep_first(cast, code)
            e, s = squares(x, cast, code, scratch.gaps)
            error[row] += e
            norm[row] += s
