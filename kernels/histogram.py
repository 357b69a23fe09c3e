"""Histograms: a long group's values counted in companded bins, outlier-proof.

A value x falls into bin ``half * (1 + d / (|d| + s))`` with d = x - mean and s twice the mean
absolute deviation of a normal distribution: nearly uniform bins in the bulk, ever wider ones
outside, and no value beyond the last bin. The scale comes from absolute deviations because squares
let one outlier decide.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sketchconv.kernels.jit import inner
from sketchconv.kernels.sweeps import LANES, deviation_sum, moment_sums

SPREAD = 2.5066282746310002  # 2 * sqrt(pi / 2)
BLOCKS = 32  # pieces of the axis whose density places the coarse grid
MOST_BLOCKS = 64
SAMPLES = 64


@inner
def rough_mean(x: Any) -> Any:
    """Mean of up to about 64 values, evenly spaced: it only places the bins."""
    step = max(x.size // SAMPLES, 1)
    total = 0.0
    count = 0
    for i in range(0, x.size, step):
        total += x[i]
        count += 1
    return np.float32(total / count)


@inner
def mean_deviation(x: Any, mass: Any, centre: Any) -> Any:
    """Weighted mean of |x - centre|, mean of the masses being 1."""
    whole = x.size - x.size % LANES
    total = np.float64(deviation_sum(x, mass, whole, centre))
    for i in range(whole, x.size):
        total += abs(x[i] - centre) * mass[i]
    return np.float32(total / x.size)


@inner
def find_bins(x: Any, centre: Any, scale: Any, count: int, bins: Any) -> None:
    """Bin of every value, uint16."""
    half = np.float32(count // 2)
    top = np.int32(count - 1)
    for i in range(x.size):
        d = x[i] - centre
        place = np.int32(half + half * (d / (abs(d) + scale)))
        bins[i] = np.uint16(min(max(place, np.int32(0)), top))


@inner
def fill_bins(x: Any, mass: Any, weighted: bool, centre: Any, bins: Any, h: Any) -> None:
    """Add every value's mass and m * (x - centre) to its bin of ``h[2, count]``."""
    origin = np.float64(centre)
    mass_of, first_of = h[0], h[1]
    if weighted:
        for i in range(x.size):
            b = bins[i]
            m = mass[i]
            mass_of[b] += m
            first_of[b] += m * (x[i] - origin)
    else:
        for i in range(x.size):
            b = bins[i]
            mass_of[b] += 1.0
            first_of[b] += x[i] - origin


@inner
def sum_bins(h: Any, inverse: float, p0: Any, p1: Any, p2: Any) -> Any:
    """Prefix sums over the bins (values divided by the scale), `h` cleared; returns used bins.

    The spread inside a bin is the same for every partition and left out.
    """
    p0[0] = 0.0
    p1[0] = 0.0
    p2[0] = 0.0
    return moment_sums(h[0], h[1], h.shape[1], inverse, p0[1:], p1[1:], p2[1:])


def squared_widths(blocks: int) -> NDArray[np.float64]:
    """Squared widths of equal runs of bins, in scales; 0 for the two without an outer end."""
    edges = np.abs(2.0 * np.arange(1, blocks) / blocks - 1.0)
    places = edges / (1.0 - edges)
    widths = np.zeros(blocks)
    widths[1:-1] = np.square(np.diff(places))
    return widths


@inner
def _flatter_root(x: Any) -> Any:
    """x^(9/32), less than a cube root on purpose: see `bin_density`.

    Of square roots, which round alike on every machine.
    """
    fourth = np.sqrt(np.sqrt(x))
    return fourth * np.sqrt(np.sqrt(np.sqrt(fourth)))


@inner
def bin_density(p0: Any, p1: Any, squares: Any, density: Any, places: Any) -> None:
    """Density of the coarse grid in equal runs of bins, and where they begin.

    That is (mass * width^2)^(9/32): a little flatter than the asymptotic 1/3 lost fewer rows, as
    measured on real ones. The outermost runs have no end: they count as twice as wide as their
    mean is far.
    """
    blocks = density.size
    step = (p0.size - 1) // blocks
    for b in range(blocks + 1):
        places[b] = b * step
    for b in range(blocks):
        density[b] = (p0[(b + 1) * step] - p0[b * step]) * squares[b]
    near = (1.0 - 2.0 / blocks) / (2.0 / blocks)
    for b in (0, blocks - 1):
        mass = p0[(b + 1) * step] - p0[b * step]
        mean = abs(p1[(b + 1) * step] - p1[b * step]) / max(mass, 1e-300)
        width = 2.0 * max(mean - near, 0.0)
        density[b] = mass * width * width
    for b in range(blocks):
        density[b] = _flatter_root(density[b])


@inner
def bin_means(p0: Any, p1: Any, centre: float, scale: float, bounds: Any, entries: Any) -> None:
    """``entries[j]`` = mean of the values in bins ``bounds[j]`` to ``bounds[j + 1]``."""
    for j in range(entries.size):
        mass = p0[bounds[j + 1]] - p0[bounds[j]]
        if mass > 0.0:
            entries[j] = centre + scale * ((p1[bounds[j + 1]] - p1[bounds[j]]) / mass)
        else:
            entries[j] = entries[j - 1] if j else centre
