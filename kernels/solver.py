"""The solver: one LUT and its codes per (row, group), near the weighted k-means optimum."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sketchconv.kernels.atoms import (
    atom_density,
    atom_means,
    gather_atoms,
    sort_keys,
    sum_atoms,
)
from sketchconv.kernels.coding import count_above, fill_thresholds, round_entries, squares
from sketchconv.kernels.exact import exact_bounds
from sketchconv.kernels.histogram import (
    BLOCKS,
    SPREAD,
    bin_density,
    bin_means,
    fill_bins,
    find_bins,
    mean_deviation,
    rough_mean,
    sum_bins,
)
from sketchconv.kernels.jit import jit
from sketchconv.kernels.lagrange import priced_bounds
from sketchconv.kernels.partition import (
    PER_CLUSTER,
    Room,
    choose_edges,
    choose_near,
    drop_empty,
    make_room,
    spread_edges,
)

MOST_BINNED = 16
SHORTEST_BINNED = 256
LONG = 2048
SMALLEST, LARGEST = np.float32(1e-30), np.float32(1e30)
CELLS = 6
PER_BLOCK = 8


class Scratch(NamedTuple):
    """Arrays that a thread uses again for every group of n values and k entries."""

    room: Room
    bounds: NDArray[np.int64]  # [k + 1]
    entries: NDArray[np.float64]  # [k]
    prefix: NDArray[np.float64]  # [3, max(n, bins) + 1]
    density: NDArray[np.float64]
    places: NDArray[np.int64]
    edges: NDArray[np.int64]
    bins: NDArray[np.uint16]  # [n]
    histogram: NDArray[np.float64]  # [2, bins]
    keys: NDArray[np.uint64]  # [2, n]
    atoms: NDArray[np.float64]  # [2, n] values, masses
    gaps: NDArray[np.float32]  # [n]


@jit
def make_scratch(n: int, k: int) -> Any:
    """A `Scratch` for groups of n values and k entries."""
    bins = 1024 if n >= LONG else 512
    blocks = max(BLOCKS, n // PER_BLOCK + 1)
    return Scratch(
        make_room(k),
        np.zeros(k + 1, np.int64),
        np.zeros(k),
        np.zeros((3, max(n, bins) + 1)),
        np.zeros(blocks),
        np.zeros(blocks + 1, np.int64),
        np.zeros(max(PER_CLUSTER, CELLS) * k + 1, np.int64),
        np.zeros(n, np.uint16),
        np.zeros((2, bins)),
        np.zeros((2, n), np.uint64),
        np.zeros((2, n)),
        np.zeros(n, np.float32),
    )


@jit
def _solve_bins(x: Any, mass: Any, weighted: bool, s: Any) -> Any:
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
    if sum_bins(s.histogram, 1.0 / np.float64(scale), p0, p1, p2) < 4 * k:
        return False
    edges = s.edges[: PER_CLUSTER * k + 1]
    bin_density(p0, p1, s.density, s.places)
    spread_edges(s.density[:BLOCKS], s.places, edges)
    choose_edges(p0, p1, p2, edges, s.bounds, s.room)
    choose_near(p0, p1, p2, 8, s.bounds, s.room)
    choose_near(p0, p1, p2, 32, s.bounds, s.room)
    bin_means(p0, p1, np.float64(centre), np.float64(scale), s.bounds, s.entries)
    return True


@jit
def _near_bounds(values: Any, p0: Any, p1: Any, p2: Any, s: Any) -> None:
    """Near-optimal partition of sorted atoms, on cells of a sixth of a cluster if many."""
    k = s.entries.size
    blocks = max(values.size // PER_BLOCK, 1)
    density, places = s.density[:blocks], s.places[: blocks + 1]
    integral = atom_density(values, p0, p1, density, places)
    cells = CELLS * k
    edges = s.edges[: cells + 1]
    if values.size > cells:
        spread_edges(density, places, edges)
        cells = drop_empty(edges)
    if values.size <= cells or cells <= k:
        if priced_bounds(p0, p1, p2, integral, s.bounds):
            return
    else:
        q = np.empty((3, cells + 1))
        for e in range(cells + 1):
            q[0, e] = p0[edges[e]]
            q[1, e] = p1[edges[e]]
            q[2, e] = p2[edges[e]]
        priced_bounds(q[0], q[1], q[2], integral, s.bounds)
        for j in range(k + 1):
            s.bounds[j] = edges[s.bounds[j]]
    for divisor in (8, 16, 32):
        if choose_near(p0, p1, p2, divisor, s.bounds, s.room) <= 1.0:
            break


@jit
def _solve_atoms(x: Any, words: Any, mass: Any, weighted: bool, exact: bool, s: Any) -> None:
    """Fill ``s.entries`` by way of the sorted distinct values."""
    k = s.entries.size
    values, masses = s.atoms[0], s.atoms[1]
    sort_keys(words, s.keys[0], s.keys[1])
    atoms = gather_atoms(x, mass, weighted, s.keys[0], values, masses, k)
    if atoms <= k:
        for j in range(k + 1):
            s.bounds[j] = min(j, atoms)
    else:
        p0, p1, p2 = s.prefix[0, : atoms + 1], s.prefix[1, : atoms + 1], s.prefix[2, : atoms + 1]
        sum_atoms(values[:atoms], masses[:atoms], p0, p1, p2)
        if exact:
            exact_bounds(p0, p1, p2, s.bounds)
        else:
            _near_bounds(values[:atoms], p0, p1, p2, s)
    atom_means(values, masses, s.bounds, s.entries)


@jit
def solve_span(
    weight: Any,
    words: Any,
    mass: Any,
    weighted: bool,
    exact: bool,
    kind: int,
    codes: Any,
    luts: Any,
    error: Any,
    norm: Any,
    begin: int,
    end: int,
) -> None:
    """Solve the rows from `begin` to `end`; `words` is the uint32 view of `weight`.

    `mass` is float32 ``[groups, columns / groups]`` with mean 1 per group; `luts` float32
    ``[rows, groups, k]`` receives the rounded entries.
    """
    groups, k = luts.shape[1], luts.shape[2]
    size = weight.shape[1] // groups
    binned = not exact and k <= MOST_BINNED and size >= SHORTEST_BINNED
    scratch = make_scratch(size, k)
    cast_words = np.empty(k, np.uint32)
    cast = cast_words.view(np.float32)
    thresholds = np.empty((k + 6) // 8 * 8, np.float32)
    for row in range(begin, end):
        error[row] = 0.0
        norm[row] = 0.0
        for group in range(groups):
            first, last = group * size, (group + 1) * size
            x, code = weight[row, first:last], codes[row, first:last]
            if not (binned and _solve_bins(x, mass[group], weighted, scratch)):
                _solve_atoms(x, words[row, first:last], mass[group], weighted, exact, scratch)
            round_entries(scratch.entries, kind, cast, cast_words)
            luts[row, group] = cast
            fill_thresholds(cast, thresholds)
            count_above(x, thresholds, code)
            e, s = squares(x, cast, code, scratch.gaps)
            error[row] += e
            norm[row] += s
