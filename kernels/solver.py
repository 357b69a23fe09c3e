"""The solver: one LUT and its codes per (row, group), near the weighted k-means optimum."""

from __future__ import annotations

from typing import Any

import numpy as np

from sketchconv.kernels.atoms import (
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
    choose_edges,
    choose_near,
    drop_empty,
    split,
    spread_edges,
)
from sketchconv.kernels.scratch import CELLS, PER_BLOCK

MOST_BINNED = 16
SHORTEST_BINNED = 256
CLOSE = 32  # prices that buy fewer and more by this part of k are near enough
LEAST_USED = 5  # an outlier or few distinct values leave less than this part of the bins used
SMALLEST, LARGEST = np.float32(1e-30), np.float32(1e30)


@inner
def _near_bins(p0: Any, p1: Any, p2: Any, uneven: bool, s: Any) -> None:
    """Near-optimal partition of the bins.

    Where few columns carry the weight (`uneven`) the coarse grid follows them more closely, and
    the next round looks further for what it missed.
    """
    k = s.entries.size
    edges = s.edges[: PER_CLUSTER * k + 1]
    widths = s.widths[1] if uneven else s.widths[0]
    density = s.density[: widths.size]
    bin_density(p0, p1, widths, density, s.places)
    spread_edges(density, s.places, edges)
    choose_edges(p0, p1, p2, edges, s.bounds, s.room)
    rounds = s.rounds[1] if uneven else s.rounds[0]
    for divisor in rounds:
        choose_near(p0, p1, p2, divisor, s.bounds, s.room)


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
    close = k // CLOSE
    integral = atom_density(values, p0, p1, cells, density, places)
    edges = s.edges[: cells + 1]
    if values.size > cells:
        spread_edges(density, places, edges)
        cells = drop_empty(edges)
    if values.size <= cells or cells <= k:
        if priced_bounds(p0, p1, p2, integral, close, s.bounds, s.costs[0], s.paths):
            return
    else:
        q = s.cells[:, : cells + 1]
        for e in range(cells + 1):
            q[0, e] = p0[edges[e]]
            q[1, e] = p1[edges[e]]
            q[2, e] = p2[edges[e]]
        priced_bounds(q[0], q[1], q[2], integral, close, s.bounds, s.costs[0], s.paths)
        for j in range(k + 1):
            s.bounds[j] = edges[s.bounds[j]]
    for divisor in (8, 16, 32):
        if choose_near(p0, p1, p2, divisor, s.bounds, s.room) <= 1.0:
            break


@inner
def _best_bounds(values: Any, p0: Any, p1: Any, p2: Any, s: Any) -> None:
    """Optimal partition of sorted atoms; for many clusters a price that buys them is faster."""
    if s.entries.size > MOST_BINNED:
        blocks = max(values.size // PER_BLOCK, 1)
        density, places = s.density[:blocks], s.places[: blocks + 1]
        integral = atom_density(values, p0, p1, values.size, density, places)
        if priced_bounds(p0, p1, p2, integral, 0, s.bounds, s.costs[0], s.paths):
            return
    exact_bounds(p0, p1, p2, s.bounds, s.costs, s.starts)


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
            _best_bounds(values[:atoms], p0, p1, p2, s)
        else:
            _near_bounds(values[:atoms], p0, p1, p2, s)
    atom_means(values, masses, s.bounds, s.entries)


@inner
def _all_finite(words: Any) -> Any:
    """Whether no bit pattern of `words` is NaN or infinite."""
    largest = np.uint32(0)
    for i in range(words.size):
        largest = max(largest, np.uint32(words[i] & np.uint32(0x7FFFFFFF)))
    return largest < np.uint32(0x7F800000)


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
    group; `luts` float32 ``[rows, groups, k]`` receives the rounded entries. A group that is not
    finite is left out, and the `norm` of its row becomes NaN.
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
            if not _all_finite(words[row, first:last]):
                norm[row] = np.nan
                continue
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
