"""Reductions over weight rows: squares by row and by column, non-finite counts, bf16 widening.

Every sum has one order, fixed by the array's shape alone, so its bits depend neither on the number
of threads nor on how the rows were cut into chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sketchconv.kernels.jit import jit
from sketchconv.kernels.threads import for_spans

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Span = Callable[..., None]  # a compiled loop over rows or columns `begin` to `end`
LANES = 16


@jit
def _squared_matvec_span(weight: Any, x: Any, out: Any, begin: int, end: int) -> None:
    lanes = np.empty(LANES, np.float64)
    whole = x.size // LANES
    for row in range(begin, end):
        lanes[:] = 0.0
        line = weight[row]
        for block in range(whole):
            w = line[block * LANES : block * LANES + LANES]
            v = x[block * LANES : block * LANES + LANES]
            for lane in range(LANES):
                value = np.float64(w[lane])
                lanes[lane] += value * value * v[lane]
        total = 0.0
        for lane in range(LANES):
            total += lanes[lane]
        for column in range(whole * LANES, x.size):
            value = np.float64(line[column])
            total += value * value * x[column]
        out[row] = total


@jit
def _column_squares_span(weight: Any, out: Any, begin: int, end: int) -> None:
    target = out[begin:end]
    for row in range(weight.shape[0]):
        line = weight[row, begin:end]
        for column in range(target.size):
            value = np.float64(line[column])
            target[column] += value * value


@jit
def _matvec_span(weight: Any, x: Any, out: Any, begin: int, end: int) -> None:
    lanes = np.empty(LANES, np.float64)
    whole = x.size // LANES
    for row in range(begin, end):
        lanes[:] = 0.0
        line = weight[row]
        for block in range(whole):
            w = line[block * LANES : block * LANES + LANES]
            v = x[block * LANES : block * LANES + LANES]
            for lane in range(LANES):
                lanes[lane] += np.float64(w[lane]) * v[lane]
        total = 0.0
        for lane in range(LANES):
            total += lanes[lane]
        for column in range(whole * LANES, x.size):
            total += np.float64(line[column]) * x[column]
        out[row] = total


@jit
def _column_sums_span(weight: Any, out: Any, begin: int, end: int) -> None:
    target = out[begin:end]
    for row in range(weight.shape[0]):
        line = weight[row, begin:end]
        for column in range(target.size):
            target[column] += np.float64(line[column])


@jit
def _nonfinite_span(bits: Any, out: Any, begin: int, end: int) -> None:
    exponent = np.uint32(0x7F800000)
    for row in range(begin, end):
        line = bits[row]
        count = 0
        for column in range(line.size):
            count += (line[column] & exponent) == exponent
        out[row] = count


@jit
def _widen_span(source: Any, target: Any, begin: int, end: int) -> None:
    a = source[begin:end]
    b = target[begin:end]
    for i in range(a.size):
        b[i] = np.uint32(a[i]) << np.uint32(16)


def squared_matvec(weight: F32, x: F64, *, threads: int | None = None) -> F64:
    """``out[r] = sum_c weight[r, c]**2 * x[c]`` in float64.

    Args:
        weight: float32 ``[rows, columns]``.
        x: float64 ``[columns]``.
        threads: None means every core; the bits of the result do not depend on it.

    Returns:
        float64 ``[rows]``.

    Raises:
        ValueError: the columns differ.
    """
    return _of_rows(_squared_matvec_span, weight, x, threads)


def matvec(weight: F32, x: F64, *, threads: int | None = None) -> F64:
    """``out[r] = sum_c weight[r, c] * x[c]`` in float64.

    Args:
        weight: float32 ``[rows, columns]``.
        x: float64 ``[columns]``.
        threads: None means every core; the bits of the result do not depend on it.

    Returns:
        float64 ``[rows]``.

    Raises:
        ValueError: the columns differ.
    """
    return _of_rows(_matvec_span, weight, x, threads)


def _of_rows(span: Span, weight: F32, x: F64, threads: int | None) -> F64:
    """What `span` makes of each row and `x`, float64 ``[rows]``."""
    rows, columns = weight.shape
    if x.shape != (columns,):
        raise ValueError(f"x has shape {x.shape}, the weight has {columns} columns")
    source = np.ascontiguousarray(weight, np.float32)
    vector = np.ascontiguousarray(x, np.float64)
    out = np.empty(rows, np.float64)
    for_spans(lambda b, e: span(source, vector, out, b, e), rows, source.size, threads)
    return out


def accumulate_column_squares(weight: F32, out: F64, *, threads: int | None = None) -> None:
    """``out[c] += sum_r weight[r, c]**2``, row after row, in place.

    Feeding a matrix in several row chunks gives the same bits as feeding it at once.

    Args:
        weight: float32 ``[rows, columns]``.
        out: float64 ``[columns]``, C-contiguous.
        threads: None means every core; the bits of the result do not depend on it.

    Raises:
        ValueError: the columns differ, or `out` is not a contiguous float64 array.
    """
    _into_columns(_column_squares_span, weight, out, threads)


def accumulate_column_sums(weight: F32, out: F64, *, threads: int | None = None) -> None:
    """``out[c] += sum_r weight[r, c]``, row after row, in place.

    Feeding a matrix in several row chunks gives the same bits as feeding it at once.

    Args:
        weight: float32 ``[rows, columns]``.
        out: float64 ``[columns]``, C-contiguous.
        threads: None means every core; the bits of the result do not depend on it.

    Raises:
        ValueError: the columns differ, or `out` is not a contiguous float64 array.
    """
    _into_columns(_column_sums_span, weight, out, threads)


def _into_columns(span: Span, weight: F32, out: F64, threads: int | None) -> None:
    """Add what `span` makes of each column to `out`."""
    columns = weight.shape[1]
    if out.shape != (columns,) or out.dtype != np.float64 or not out.flags.c_contiguous:
        raise ValueError(f"out must be contiguous float64 of shape ({columns},)")
    source = np.ascontiguousarray(weight, np.float32)
    for_spans(lambda b, e: span(source, out, b, e), columns, source.size, threads)


def nonfinite_rows(weight: F32, *, threads: int | None = None) -> NDArray[np.int64]:
    """Count NaN and infinite values: float32 ``[rows, columns]`` to int64 ``[rows]``."""
    bits = np.ascontiguousarray(weight, np.float32).view(np.uint32)
    out = np.empty(bits.shape[0], np.int64)
    for_spans(lambda b, e: _nonfinite_span(bits, out, b, e), bits.shape[0], bits.size, threads)
    return out


def bf16_to_f32(source: NDArray[np.uint16], *, threads: int | None = None) -> F32:
    """Widen bfloat16 (carried as uint16, any shape) to float32 of the same shape, exactly."""
    flat = np.ascontiguousarray(source, np.uint16).reshape(-1)
    out = np.empty(flat.size, np.uint32)
    for_spans(lambda b, e: _widen_span(flat, out, b, e), flat.size, flat.size, threads)
    return out.view(np.float32).reshape(source.shape)
