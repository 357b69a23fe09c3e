"""Histograms: a long group's values counted in companded bins, outlier-proof.

A value x falls into bin ``half * (1 + d / (|d| + s))`` with d = x - mean and s twice the mean
absolute deviation of a normal distribution: nearly uniform bins in the bulk, ever wider ones
outside, and no value beyond the last bin. The scale comes from absolute deviations because squares
let one outlier decide.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sketchconv.kernels.jit import jit
from sketchconv.kernels.partition import cube_root

LANES = 16
SPREAD = 2.5066282746310002  # 2 * sqrt(pi / 2)
BLOCKS = 32


@jit
def _lane_sum(lanes: Any) -> Any:
    total = 0.0
    for lane in range(LANES):
        total += np.float64(lanes[lane])
    return total


@jit
def mean_value(x: Any, mass: Any, weighted: bool, lanes: Any) -> Any:
    """Mean of x, good to float32: it only places the bins."""
    lanes[:] = 0
    whole = x.size // LANES
    for block in range(whole):
        part = x[block * LANES : block * LANES + LANES]
        if weighted:
            m = mass[block * LANES : block * LANES + LANES]
            for lane in range(LANES):
                lanes[lane] += part[lane] * m[lane]
        else:
            for lane in range(LANES):
                lanes[lane] += part[lane]
    total = _lane_sum(lanes)
    for i in range(whole * LANES, x.size):
        total += x[i] * (mass[i] if weighted else np.float32(1.0))
    return total / x.size


@jit
def mean_deviation(x: Any, mass: Any, weighted: bool, centre: Any, lanes: Any) -> Any:
    """Mean of |x - centre|."""
    lanes[:] = 0
    whole = x.size // LANES
    for block in range(whole):
        part = x[block * LANES : block * LANES + LANES]
        if weighted:
            m = mass[block * LANES : block * LANES + LANES]
            for lane in range(LANES):
                lanes[lane] += abs(part[lane] - centre) * m[lane]
        else:
            for lane in range(LANES):
                lanes[lane] += abs(part[lane] - centre)
    total = _lane_sum(lanes)
    for i in range(whole * LANES, x.size):
        total += abs(x[i] - centre) * (mass[i] if weighted else np.float32(1.0))
    return total / x.size


@jit
def find_bins(x: Any, centre: Any, scale: Any, count: int, bins: Any) -> None:
    """Bin of every value, uint16."""
    half = np.float32(count // 2)
    top = np.int32(count - 1)
    for i in range(x.size):
        d = x[i] - centre
        place = np.int32(half + half * (d / (abs(d) + scale)))
        bins[i] = np.uint16(min(max(place, np.int32(0)), top))


@jit
def fill_bins(x: Any, mass: Any, weighted: bool, centre: Any, bins: Any, h: Any) -> None:
    """Add every value's mass and m * (x - centre) to its bin of ``h[count, 2]``."""
    origin = np.float64(centre)
    if weighted:
        for i in range(x.size):
            b = bins[i]
            m = mass[i]
            h[b, 0] += m
            h[b, 1] += m * (x[i] - origin)
    else:
        for i in range(x.size):
            b = bins[i]
            h[b, 0] += 1.0
            h[b, 1] += x[i] - origin


@jit
def sum_bins(h: Any, inverse: float, p0: Any, p1: Any, p2: Any) -> Any:
    """Prefix sums over the bins (values divided by the scale), `h` cleared; returns used bins.

    The spread inside a bin is the same for every partition and left out.
    """
    used = 0
    s0 = s1 = s2 = 0.0
    p0[0] = p1[0] = p2[0] = 0.0
    for b in range(h.shape[0]):
        m = h[b, 0]
        d = h[b, 1] * inverse
        h[b, 0] = h[b, 1] = 0.0
        used += m > 0.0
        s0 += m
        s1 += d
        s2 += d * d / max(m, 1e-300)
        p0[b + 1] = s0
        p1[b + 1] = s1
        p2[b + 1] = s2
    return used


@jit
def bin_density(p0: Any, p1: Any, density: Any, places: Any) -> None:
    """(mass * width^2)^(1/3) of `BLOCKS` blocks of bins, and where they begin.

    The outermost blocks have no end: they count as twice as wide as their mean is far.
    """
    step = (p0.size - 1) // BLOCKS
    for b in range(BLOCKS):
        begin, end = b * step, (b + 1) * step
        places[b] = begin
        low, high = abs(2.0 * b / BLOCKS - 1.0), abs(2.0 * (b + 1) / BLOCKS - 1.0)
        mass = p0[end] - p0[begin]
        if 0 < b < BLOCKS - 1:
            width = abs(high / (1.0 - high) - low / (1.0 - low))
        else:
            near = min(low, high) / (1.0 - min(low, high))
            mean = abs(p1[end] - p1[begin]) / max(mass, 1e-300)
            width = 2.0 * max(mean - near, 0.0)
        density[b] = cube_root(mass * width * width)
    places[BLOCKS] = step * BLOCKS


@jit
def bin_means(p0: Any, p1: Any, centre: float, scale: float, bounds: Any, entries: Any) -> None:
    """``entries[j]`` = mean of the values in bins ``bounds[j]`` to ``bounds[j + 1]``."""
    for j in range(entries.size):
        mass = p0[bounds[j + 1]] - p0[bounds[j]]
        if mass > 0.0:
            entries[j] = centre + scale * ((p1[bounds[j + 1]] - p1[bounds[j]]) / mass)
        else:
            entries[j] = entries[j - 1] if j else centre
