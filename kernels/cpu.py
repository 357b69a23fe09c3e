"""The public face of the CPU kernels: solve, pack, widen, reduce. NumPy arrays in and out.

Results have the same bytes at any number of threads and for any chunking of the rows, and, since
only correctly rounded operations in a fixed order are used, on any IEEE 754 machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sketchconv.kernels.entries import KINDS
from sketchconv.kernels.planes import pack_rows
from sketchconv.kernels.reductions import (
    accumulate_column_squares,
    accumulate_column_sums,
    bf16_to_f32,
    matvec,
    nonfinite_rows,
    squared_matvec,
)
from sketchconv.kernels.scratch import make_scratch
from sketchconv.kernels.solver import solve_span
from sketchconv.kernels.threads import for_spans

__all__ = [
    "LutRangeError",
    "SolvedRows",
    "accumulate_column_squares",
    "accumulate_column_sums",
    "bf16_to_f32",
    "matvec",
    "nonfinite_rows",
    "pack_rows",
    "solve_rows",
    "squared_matvec",
]

# Columns per entry, counted by weight (sum^2 / sum of squares), below which a group is uneven.
UNEVEN = 32


class LutRangeError(ValueError):
    """A LUT entry is beyond the range of the LUT's dtype.

    Attributes:
        row: first row (of those given to `solve_rows`) with such an entry.
        value: float32 value of that group that is largest in size.
        lut_dtype: name of the dtype.
    """

    def __init__(self, row: int, value: float, lut_dtype: str) -> None:
        self.row = row
        self.value = value
        self.lut_dtype = lut_dtype
        super().__init__(f"row {row}: {value:g} is beyond the range of a {lut_dtype} LUT")


@dataclass(frozen=True, slots=True)
class SolvedRows:
    """Sketched rows.

    Attributes:
        indices: uint8 ``[rows, columns]``, unpacked.
        lut: ``[rows, groups, 2**bits]``, ascending; float16, uint16 (BF16) or float32.
        squared_error: float64 ``[rows]``, unweighted ``sum_c (w - decoded)**2``.
        squared_norm: float64 ``[rows]``, ``sum_c w**2``.
    """

    indices: NDArray[np.uint8]
    lut: NDArray[Any]
    squared_error: NDArray[np.float64]
    squared_norm: NDArray[np.float64]


def solve_rows(
    weight: NDArray[np.float32],
    bits: int,
    groups: int,
    *,
    column_weights: NDArray[np.floating] | None = None,
    lut_dtype: str = "F16",
    threads: int | None = None,
    exact: bool = False,
) -> SolvedRows:
    """Fit one LUT per row and group and code every weight by its nearest entry.

    Minimises ``sum_c column_weights[c] * (w - lut[code])**2`` for each (row, group). A group with
    at most ``2**bits`` distinct values gets exactly those values, up to the LUT's rounding. Ties
    between two entries go to the lower index.

    Args:
        weight: float32 ``[rows, columns]``, finite.
        bits: 1 to 8.
        groups: LUTs per row, over equal runs of consecutive columns; must divide the columns.
        column_weights: ``[columns]``, finite, not negative; None means equal weights, and so does
            a group whose weights are all zero.
        lut_dtype: "F16", "BF16" or "F32".
        threads: None means every core that the process may use; no result depends on it.
        exact: find the global optimum before rounding instead of coming near it, for
            thirty to a hundred times the time at 4 bits.

    Raises:
        LutRangeError: an entry overflows `lut_dtype`.
        ValueError: an argument is out of its range, or `weight` holds NaN or infinity.
    """
    source, mass = _checked(weight, bits, groups, column_weights, lut_dtype, threads)
    rows, columns = source.shape
    codes = np.empty((rows, columns), np.uint8)
    luts = np.empty((rows, groups, 1 << bits), np.float32)
    error, norm = np.empty(rows), np.empty(rows)
    words = source.view(np.uint32)
    masses = np.ones((groups, columns // groups), np.float32) if mass is None else mass
    uneven = _uneven(mass, groups, bits)
    for_spans(
        lambda b, e: solve_span(
            source, words, masses, mass is not None, uneven, exact, KINDS[lut_dtype],
            codes, luts, error, norm,
            make_scratch(columns // groups, 1 << bits, exact), b, e,
        ),
        rows,
        source.size,
        threads,
    )  # fmt: skip
    _refuse_nonfinite(source, norm)
    return SolvedRows(codes, _carrier(luts, source, lut_dtype), error, norm)


def _checked(
    weight: NDArray[np.float32],
    bits: int,
    groups: int,
    column_weights: NDArray[np.floating] | None,
    lut_dtype: str,
    threads: int | None,
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    if weight.ndim != 2 or weight.dtype != np.float32 or weight.shape[1] < 1:
        raise ValueError(
            f"weight must be float32 [rows, columns], not {weight.dtype} {weight.shape}"
        )
    if not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits}, must be 1 to 8")
    if groups < 1 or weight.shape[1] % groups:
        raise ValueError(f"{groups} groups do not divide {weight.shape[1]} columns")
    if lut_dtype not in KINDS:
        raise ValueError(f"lut_dtype is {lut_dtype!r}, must be one of {', '.join(KINDS)}")
    source = np.ascontiguousarray(weight)
    if column_weights is None:
        return source, None
    return source, _masses(np.asarray(column_weights, np.float64), weight.shape[1], groups)


def _refuse_nonfinite(weight: NDArray[np.float32], norm: NDArray[np.float64]) -> None:
    """Raise ValueError for the first row that the solver found not finite.

    The solver looks at a group just before it needs it: a pass of its own over the weights took
    2 to 3 % of the time.
    """
    bad = np.flatnonzero(np.isnan(norm))
    if bad.size:
        row = int(bad[0])
        count = int(np.count_nonzero(~np.isfinite(weight[row])))
        raise ValueError(f"row {row} has {count} values that are not finite")


def _masses(weights: NDArray[np.float64], columns: int, groups: int) -> NDArray[np.float32]:
    """Column weights ``[groups, columns / groups]``, each group scaled to mean 1."""
    if weights.shape != (columns,):
        raise ValueError(f"column_weights has shape {weights.shape}, the rows {columns} columns")
    bad = ~(np.isfinite(weights) & (weights >= 0))
    if bad.any():
        column = int(np.flatnonzero(bad)[0])
        raise ValueError(f"column weight {column} is {weights[column]}, must be finite and >= 0")
    mass = weights.reshape(groups, -1).copy()
    mass[mass.max(axis=1) == 0] = 1.0
    mass /= mass.max(axis=1, keepdims=True)
    scaled: NDArray[np.float32] = (mass / mass.mean(axis=1, keepdims=True)).astype(np.float32)
    return scaled


def _uneven(mass: NDArray[np.float32] | None, groups: int, bits: int) -> NDArray[np.bool_]:
    """Groups in which few columns, counted by their weight, share the LUT's entries."""
    if mass is None:
        return np.zeros(groups, np.bool_)
    concentration: NDArray[np.float64] = np.square(mass, dtype=np.float64).mean(axis=1)
    uneven: NDArray[np.bool_] = mass.shape[1] < UNEVEN * (1 << bits) * concentration
    return uneven


def _carrier(
    luts: NDArray[np.float32], weight: NDArray[np.float32], lut_dtype: str
) -> NDArray[Any]:
    """The rounded float32 entries in the LUT's own dtype."""
    if not np.isfinite(luts).all():
        row, group, _ = (int(i) for i in np.argwhere(~np.isfinite(luts))[0])
        values = weight[row].reshape(luts.shape[1], -1)[group]
        raise LutRangeError(row, float(values[np.abs(values).argmax()]), lut_dtype)
    if lut_dtype == "F16":
        return luts.astype(np.float16)
    if lut_dtype == "BF16":
        return (luts.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return luts
