"""The reference: plain NumPy, slow and obviously right. Every fast kernel is tested against it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
U8 = NDArray[np.uint8]


def optimal_lut(values: ArrayLike, k: int, weights: ArrayLike | None = None) -> F64:
    """The k values that minimise ``sum_i weights[i] * (values[i] - nearest)**2``, ascending.

    Exact weighted one-dimensional k-means: an optimal cluster is an interval of the sorted distinct
    values, so a dynamic program over interval ends finds the optimum (Wang and Song 2011).
    O(k n^2) time, O(n^2) memory.

    Args:
        values: ``[n]``, finite, n >= 1.
        k: entries, at least 1.
        weights: ``[n]``, not negative; None or all zeros means equal weights.

    Returns:
        float64 ``[k]``; where the values that carry weight are fewer than k, the largest entry is
        repeated.
    """
    x = np.asarray(values, np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, np.float64)
    if not w.any():
        w = np.ones_like(x)
    atoms, place = np.unique(x[w > 0], return_inverse=True)
    mass: F64 = np.bincount(place, w[w > 0]).astype(np.float64)
    if atoms.size <= k:
        return np.concatenate([atoms, np.full(k - atoms.size, atoms[-1])])
    cost = _interval_costs(atoms, mass)
    ends = _best_ends(cost, k)
    return np.array([_mean(atoms[a:b], mass[a:b]) for a, b in pairwise(ends)])


def _mean(atoms: F64, mass: F64) -> float:
    return float(atoms[0] + np.sum((atoms - atoms[0]) * mass) / np.sum(mass))


def _interval_costs(atoms: F64, mass: F64) -> F64:
    """``cost[a, b]``: weighted squared error of ``atoms[a:b]`` about its mean; inf if empty."""
    count = atoms.size
    cost = np.full((count, count + 1), np.inf)
    for a in range(count):
        shifted = atoms[a:] - atoms[a]
        w, s, q = (np.cumsum(mass[a:] * shifted**power) for power in (0, 1, 2))
        cost[a, a + 1 :] = np.maximum(q - s * s / w, 0.0)
    return cost


def _best_ends(cost: F64, k: int) -> list[int]:
    count = cost.shape[0]
    best = cost[0].copy()
    starts = []
    for _ in range(k - 1):
        total = best[:-1, None] + cost
        starts.append(total.argmin(axis=0))
        best = total.min(axis=0)
    ends = [count]
    for start in reversed(starts):
        ends.append(int(start[ends[-1]]))
    return [0, *reversed(ends)]


def encode(weight: F32, lut: F32) -> U8:
    """Index of the nearest LUT entry, ties to the lower index.

    Args:
        weight: float32 ``[rows, columns]``.
        lut: float32 ``[rows, groups, k]``, k <= 256; groups divide the columns.

    Returns:
        uint8 ``[rows, columns]``.
    """
    rows, groups, _ = lut.shape
    grouped = weight.reshape(rows, groups, -1).astype(np.float64)
    codes = np.empty(grouped.shape, np.uint8)
    for row in range(rows):
        for group in range(groups):
            entries = lut[row, group].astype(np.float64)
            distance = np.abs(grouped[row, group][:, None] - entries[None, :])
            codes[row, group] = distance.argmin(axis=1)
    return codes.reshape(weight.shape)


def decode(indices: U8, lut: NDArray[np.floating]) -> F32:
    """``W[r, c] = lut[r, c // (columns / groups), indices[r, c]]`` as float32.

    Args:
        indices: uint8 ``[rows, columns]``.
        lut: ``[rows, groups, k]`` in a NumPy float dtype.
    """
    rows, groups, _ = lut.shape
    grouped = indices.reshape(rows, groups, -1).astype(np.int64)
    taken = np.take_along_axis(lut, grouped, axis=2)
    return taken.reshape(indices.shape).astype(np.float32)


def squared_error(
    weight: F32, indices: U8, lut: NDArray[np.floating], column_weights: F64 | None = None
) -> F64:
    """``sum_c column_weights[c] * (weight - decoded)[r, c]**2``: float64 ``[rows]``."""
    difference = weight.astype(np.float64) - decode(indices, lut).astype(np.float64)
    scale = 1.0 if column_weights is None else np.asarray(column_weights, np.float64)
    result: F64 = (difference * difference * scale).sum(axis=1)
    return result
