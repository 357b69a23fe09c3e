"""The solver: one LUT and its codes per (row, group), near the weighted k-means optimum."""

from __future__ import annotations

from typing import Any

import numpy as np

from sketchconv.kernels.atoms import atom_means, gather_atoms, sort_keys, sum_atoms
from sketchconv.kernels.coding import count_above, fill_thresholds, round_entries, squares
from sketchconv.kernels.exact import exact_bounds
from sketchconv.kernels.jit import jit
from sketchconv.kernels.partition import (
    PER_CLUSTER,
    choose,
    coarse_candidates,
    make_room,
    near_candidates,
    spread_edges,
)

BLOCKS = 64


@jit
def _density(mass: Any, width: Any) -> Any:
    """(mass * width^2)^(5/16), for the cube root: square roots round alike on every machine."""
    root = np.sqrt(np.sqrt(mass * width * width))
    return root * np.sqrt(np.sqrt(root))


@jit
def _atom_density(values: Any, p0: Any, density: Any, places: Any) -> None:
    n = values.size
    blocks = density.size
    for b in range(blocks + 1):
        places[b] = b * n // blocks
    inverse = 1.0 / (values[n - 1] - values[0])
    for b in range(blocks):
        begin, end = places[b], places[b + 1]
        width = (values[min(end, n - 1)] - values[begin]) * inverse
        density[b] = _density(p0[end] - p0[begin], width)


@jit
def _near_bounds(values: Any, p0: Any, p1: Any, p2: Any, bounds: Any) -> None:
    """Near-optimal partition of sorted atoms."""
    k = bounds.size - 1
    blocks = min(BLOCKS, values.size)
    density = np.empty(blocks)
    places = np.empty(blocks + 1, np.int64)
    edges = np.empty(PER_CLUSTER * k + 1, np.int64)
    spots = np.empty((k + 1, 16), np.int64)
    room = make_room(k)
    _atom_density(values, p0, density, places)
    spread_edges(density, places, edges)
    coarse_candidates(edges, spots)
    choose(p0, p1, p2, spots, bounds, room)
    for divisor in (8, 32, 128):
        widest = near_candidates(bounds, divisor, spots)
        choose(p0, p1, p2, spots, bounds, room)
        if widest == 1:
            break


@jit
def _solve_atoms(x: Any, bits: Any, mass: Any, weighted: bool, exact: bool, entries: Any) -> None:
    n = x.size
    keys = np.empty(n, np.uint64)
    values = np.empty(n)
    masses = np.empty(n)
    sort_keys(bits, keys, np.empty(n, np.uint64))
    atoms, _ = gather_atoms(x, mass, weighted, keys, values, masses, entries.size)
    bounds = np.empty(entries.size + 1, np.int64)
    if atoms <= entries.size:
        for j in range(entries.size + 1):
            bounds[j] = min(j, atoms)
    else:
        p0, p1, p2 = np.empty(atoms + 1), np.empty(atoms + 1), np.empty(atoms + 1)
        sum_atoms(values[:atoms], masses[:atoms], p0, p1, p2)
        if exact:
            exact_bounds(p0, p1, p2, bounds)
        else:
            _near_bounds(values[:atoms], p0, p1, p2, bounds)
    atom_means(values, masses, bounds, entries)


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

    `mass` is float64 ``[groups, columns / groups]`` with mean 1 per group; `luts` float32
    ``[rows, groups, k]`` receives the rounded entries.
    """
    groups, k = luts.shape[1], luts.shape[2]
    size = weight.shape[1] // groups
    entries = np.empty(k)
    cast_words = np.empty(k, np.uint32)
    cast = cast_words.view(np.float32)
    thresholds = np.empty((k + 6) // 8 * 8, np.float32)
    lanes = np.empty((2, 16))
    for row in range(begin, end):
        error[row] = 0.0
        norm[row] = 0.0
        for group in range(groups):
            x = weight[row, group * size : (group + 1) * size]
            code = codes[row, group * size : (group + 1) * size]
            w = words[row, group * size : (group + 1) * size]
            _solve_atoms(x, w, mass[group], weighted, exact, entries)
            round_entries(entries, kind, cast, cast_words)
            luts[row, group] = cast
            fill_thresholds(cast, thresholds)
            count_above(x, thresholds, code)
            e, s = squares(x, cast, code, lanes)
            error[row] += e
            norm[row] += s
