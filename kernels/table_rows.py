"""Compiled look-ups and sums by entry for `tables`."""

from __future__ import annotations

from typing import Any

import numpy as np

from sketchconv.kernels.jit import jit


@jit
def look_up_rows(codes: Any, lut: Any, groups: Any, out: Any) -> None:
    """``out[r, c] = lut[r, groups[c], codes[r, c]]``."""
    for row in range(codes.shape[0]):
        table = lut[row]
        for column in range(codes.shape[1]):
            out[row, column] = table[np.uint64(groups[column]), np.uint64(codes[row, column])]


@jit
def add_rows(values: Any, codes: Any, groups: Any, out: Any) -> None:
    """``out[r, g, e]`` = float64 sum of the values of row r, group g and code e, column by column.

    Neighbours go to sums of their own, so that equal codes do not wait for each other.
    """
    _, parts, entries = out.shape
    sums = np.empty((2, parts, entries), np.float64)
    for row in range(values.shape[0]):
        sums[:] = 0.0
        for column in range(values.shape[1]):
            part = np.uint64(column & 1)
            group, entry = np.uint64(groups[column]), np.uint64(codes[row, column])
            sums[part, group, entry] += np.float64(values[row, column])
        for g in range(parts):
            for e in range(entries):
                out[row, g, e] = np.float32(sums[0, g, e] + sums[1, g, e])
