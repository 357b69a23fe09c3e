"""Atoms: the sorted distinct values of a group with their masses, and prefix sums over them.

A partition of a group is a list of positions in the atoms' order. Three prefix sums (mass, first
and second moment of the standardised values) price any interval in constant time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sketchconv.kernels.jit import inner
from sketchconv.kernels.partition import near_cube_root

DIGITS = 256
CAPPINGS = 4


@inner
def sort_keys(bits: Any, keys: Any, spare: Any, counts: Any) -> None:
    """Fill ``keys[:n]`` with (ordered value, column) in 64-bit words, ascending.

    `bits` are the float32 bit patterns as uint32; `spare` ``[n]`` and `counts` int64 ``[4, 256]``
    are scratch. Least significant digit first, so equal values keep their column order.
    """
    n = bits.size
    sign = np.uint32(0x80000000)
    for i in range(n):
        u = bits[i]
        u ^= np.uint32(0xFFFFFFFF) if u & sign else sign
        keys[i] = (np.uint64(u) << np.uint64(32)) | np.uint64(i)
    for digit in range(4):
        for value in range(DIGITS):
            counts[digit, value] = 0
    for i in range(n):
        u = keys[i] >> np.uint64(32)
        for digit in range(4):
            counts[digit, (u >> np.uint64(8 * digit)) & np.uint64(255)] += 1
    source, target = keys, spare
    for digit in range(4):
        place = counts[digit]
        total = 0
        for value in range(DIGITS):
            total, place[value] = total + place[value], total
        shift = np.uint64(32 + 8 * digit)
        for i in range(n):
            key = source[i]
            value = (key >> shift) & np.uint64(255)
            target[np.uint64(place[value])] = key
            place[value] += 1
        source, target = target, source


@inner
def gather_atoms(
    x: Any, mass: Any, weighted: bool, keys: Any, values: Any, masses: Any, limit: int
) -> Any:
    """Merge equal values: fill `values` and `masses` (float64), return the number of atoms.

    Atoms without mass are left out, unless all distinct values fit into `limit` entries.
    """
    n = x.size
    column = np.uint64(0xFFFFFFFF)
    distinct = 1
    for i in range(1, n):
        distinct += x[keys[i] & column] != x[keys[i - 1] & column]
    keep_all = distinct <= limit
    count = -1
    last = np.nan
    for i in range(n):
        c = keys[i] & column
        value = np.float64(x[c])
        m = mass[c] if weighted else 1.0
        if value == last:
            masses[count] += m
        elif m > 0.0 or keep_all:
            count += 1
            values[count] = value
            masses[count] = m
            last = value
    return count + 1


@inner
def sum_atoms(values: Any, masses: Any, p0: Any, p1: Any, p2: Any) -> None:
    """Fill the prefix sums ``[atoms + 1]`` of mass, m*d and m*d*d, d = (value - mean) / scale."""
    n = values.size
    total = 0.0
    first = 0.0
    for i in range(n):
        total += masses[i]
        first += masses[i] * (values[i] - values[0])
    mean = values[0] + first / total
    spread = 0.0
    for i in range(n):
        spread += masses[i] * abs(values[i] - mean)
    inverse = total / spread if spread > 0.0 else 1.0
    p0[0] = p1[0] = p2[0] = 0.0
    for i in range(n):
        d = (values[i] - mean) * inverse
        p0[i + 1] = p0[i] + masses[i]
        p1[i + 1] = p1[i] + masses[i] * d
        p2[i + 1] = p2[i] + masses[i] * d * d


@inner
def atom_density(values: Any, p0: Any, p1: Any, cells: int, density: Any, places: Any) -> Any:
    """(mass * width^2)^(1/3) of equal runs of atoms, and where they begin; returns the sum.

    The width of a run reaches to the next one, in the units of the prefix sums. No run counts for
    more of the `cells` than it has atoms, or an outlier would take them all.
    """
    n = values.size
    blocks = density.size
    first = p1[1] / p0[1]
    unit = ((p1[n] - p1[n - 1]) / (p0[n] - p0[n - 1]) - first) / (values[n - 1] - values[0])
    for b in range(blocks + 1):
        places[b] = b * n // blocks
    total = 0.0
    for b in range(blocks):
        begin, end = places[b], places[b + 1]
        width = (values[min(end, n - 1)] - values[begin]) * unit
        density[b] = near_cube_root((p0[end] - p0[begin]) * width * width)
        total += density[b]
    for _ in range(CAPPINGS if n > cells else 0):
        cell = total / cells
        total = 0.0
        for b in range(blocks):
            density[b] = min(density[b], (places[b + 1] - places[b]) * cell)
            total += density[b]
    return total


@inner
def atom_means(values: Any, masses: Any, bounds: Any, entries: Any) -> None:
    """``entries[j]`` = mean of ``values[bounds[j]:bounds[j + 1]]``; empty ones repeat the last."""
    for j in range(entries.size):
        begin, end = bounds[j], bounds[j + 1]
        if end <= begin:
            entries[j] = entries[j - 1] if j else values[0]
            continue
        origin = values[begin]
        if end == begin + 1:
            entries[j] = origin
            continue
        weight = 0.0
        first = 0.0
        for i in range(begin, end):
            weight += masses[i]
            first += masses[i] * (values[i] - origin)
        entries[j] = origin + first / weight
