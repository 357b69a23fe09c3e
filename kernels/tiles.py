"""Tiles for calibration on the CPU: sixteen rows side by side, one vector per column.

Rows are independent and each goes through its columns one by one, so a vector holds one column of
sixteen rows: no sum across lanes, and the wait for one row's result is filled by the others. All
results are those of the plain loops: products and differences are rounded one by one, never fused.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sketchconv.kernels import vectors as v
from sketchconv.kernels.jit import inner, jit

LANES = 16
FLOATS = v.vector(v.F32, LANES)
BYTES = v.vector(v.I8, LANES)


def _nearest(builder: Any, x: Any, lut: Any, thresholds: Any, base: Any, steps: Any) -> Any:
    """The nearest entries to `x` and their codes, by counting the thresholds below it."""

    def body(step: Any, carried: list[Any]) -> list[Any]:
        place = builder.add(base, builder.mul(step, v.I64(LANES)))
        above = builder.fcmp_ordered(">", x, v.load(builder, thresholds, FLOATS, place))
        higher = v.load(builder, lut, FLOATS, builder.add(place, v.I64(LANES)))
        value = builder.select(above, higher, carried[0])
        return [value, builder.add(carried[1], builder.zext(above, BYTES))]

    start = [v.load(builder, lut, FLOATS, base), v.constant(BYTES, 0)]
    return v.blocks(builder, steps, 1, start, body)


def _spread(builder: Any, tile: Any, factors: Any, scale: Any, place: Any, count: Any) -> None:
    """``tile[i] -= scale * factors[i]`` for `count` columns; `place` is where the tile's begin."""

    def body(column: Any, _none: list[Any]) -> list[Any]:
        offset = builder.add(place, builder.mul(column, v.I64(LANES)))
        factor = v.splat(builder, v.load(builder, factors, v.F32, column), LANES)
        old = v.load(builder, tile, FLOATS, offset)
        v.store(builder, builder.fsub(old, builder.fmul(scale, factor)), tile, offset)
        return []

    v.blocks(builder, count, 1, [], body)


@v.intrinsic
def round_column(
    _typing: Any, tile: Any, j: Any, factors: Any, lut: Any, thresholds: Any, group: Any,
    steps: Any, codes: Any, errors: Any, count: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """Round column j of `tile` to its nearest entries and spread the error over those after it.

    `factors` begins at the diagonal: ``error = (w - q) / factors[0]``, then column j + i loses
    ``error * factors[i]`` for i up to `count`.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values, column, row, tables, limits, part, last, out, lost, after = v.data_of(
            context, builder, signature, args
        )
        place = builder.mul(column, v.I64(LANES))
        base = builder.mul(part, builder.mul(builder.add(last, v.I64(1)), v.I64(LANES)))
        x = v.load(builder, values, FLOATS, place)
        value, code = _nearest(builder, x, tables, limits, base, last)
        diagonal = v.splat(builder, v.load(builder, row, v.F32, v.I64(0)), LANES)
        error = builder.fdiv(builder.fsub(x, value), diagonal)
        v.store(builder, code, out, place)
        v.store(builder, error, lost, place)
        rest = builder.gep(builder.bitcast(row, v.F32.as_pointer()), [v.I64(1)])
        _spread(builder, values, rest, error, builder.add(place, v.I64(LANES)), after)
        return context.get_dummy_value()

    kinds = (tile, v.types.int64, factors, lut, thresholds, v.types.int64, v.types.int64, codes)
    return v.types.void(*kinds, errors, v.types.int64), codegen


@v.intrinsic
def descend_column(
    _typing: Any, tile: Any, j: Any, factors: Any, lut: Any, thresholds: Any, group: Any,
    steps: Any, codes: Any, current: Any, count: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """Move column j to the entries that are best while all other columns stay.

    `tile` holds the gradient ``(W - Q) H``, `current` the decoded values; it receives the moves.
    `factors` is row j of H from the diagonal on.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values, column, row, tables, limits, part, last, out, old, after = v.data_of(
            context, builder, signature, args
        )
        place = builder.mul(column, v.I64(LANES))
        base = builder.mul(part, builder.mul(builder.add(last, v.I64(1)), v.I64(LANES)))
        diagonal = v.splat(builder, v.load(builder, row, v.F32, v.I64(0)), LANES)
        before = v.load(builder, old, FLOATS, place)
        step = builder.fdiv(v.load(builder, values, FLOATS, place), diagonal)
        goal = builder.fadd(before, step)
        value, code = _nearest(builder, goal, tables, limits, base, last)
        move = builder.fsub(value, before)
        v.store(builder, code, out, place)
        v.store(builder, move, old, place)
        rest = builder.gep(builder.bitcast(row, v.F32.as_pointer()), [v.I64(1)])
        _spread(builder, values, rest, move, builder.add(place, v.I64(LANES)), after)
        return context.get_dummy_value()

    kinds = (tile, v.types.int64, factors, lut, thresholds, v.types.int64, v.types.int64, codes)
    return v.types.void(*kinds, current, v.types.int64), codegen


@inner
def load_tile(source: Any, first: int, tile: Any) -> None:
    """``tile[c, lane] = source[first + lane, c]``; rows after the last repeat it."""
    last = source.shape[0] - 1
    for lane in range(LANES):
        line = source[min(first + lane, last)]
        for column in range(line.size):
            tile[column, lane] = line[column]


@inner
def store_tile(tile: Any, first: int, target: Any) -> None:
    """The other way; lanes after the last row are left out."""
    for lane in range(min(LANES, target.shape[0] - first)):
        line = target[first + lane]
        for column in range(line.size):
            line[column] = tile[column, lane]


@inner
def load_tables(lut: Any, thresholds: Any, first: int, tables: Any, limits: Any) -> None:
    """LUTs and thresholds of sixteen rows, entries first; the last threshold is never read."""
    last = lut.shape[0] - 1
    for lane in range(LANES):
        row = min(first + lane, last)
        for group in range(lut.shape[1]):
            for entry in range(lut.shape[2]):
                tables[group, entry, lane] = lut[row, group, entry]
            for entry in range(lut.shape[2] - 1):
                limits[group, entry, lane] = thresholds[row, group, entry]


@jit
def round_block(
    work: Any, upper: Any, lut: Any, thresholds: Any, groups: Any, codes: Any, errors: Any
) -> None:
    """Round the columns of `work`, float32 ``[rows, n]``, one after another, and compensate.

    `upper` is the block of the Cholesky factor, float32 ``[n, n]``; `codes` (uint8) and `errors`
    (float32), both ``[rows, n]``, receive the codes and the errors divided by the diagonal.
    """
    rows, width = work.shape
    shape = (lut.shape[1], lut.shape[2], LANES)
    tables, limits = np.empty(shape, np.float32), np.empty(shape, np.float32)
    tile, lost = np.empty((width, LANES), np.float32), np.empty((width, LANES), np.float32)
    out = np.empty((width, LANES), np.uint8)
    for first in range(0, rows, LANES):
        load_tile(work, first, tile)
        load_tables(lut, thresholds, first, tables, limits)
        for j in range(width):
            round_column(tile, j, upper[j, j:], tables, limits, groups[j], shape[1] - 1, out, lost,
                         width - j - 1)  # fmt: skip
        store_tile(out, first, codes)
        store_tile(lost, first, errors)


@jit
def descend_block(
    gradient: Any, hessian: Any, lut: Any, thresholds: Any, groups: Any, codes: Any, moves: Any
) -> None:
    """One sweep of coordinate descent over the columns of a block.

    `gradient` is float32 ``[rows, n]``, `hessian` the diagonal block ``[n, n]``; `moves` holds the
    decoded values ``[rows, n]`` and receives their changes; `codes` receives the codes.
    """
    rows, width = gradient.shape
    shape = (lut.shape[1], lut.shape[2], LANES)
    tables, limits = np.empty(shape, np.float32), np.empty(shape, np.float32)
    tile, current = np.empty((width, LANES), np.float32), np.empty((width, LANES), np.float32)
    out = np.empty((width, LANES), np.uint8)
    for first in range(0, rows, LANES):
        load_tile(gradient, first, tile)
        load_tile(moves, first, current)
        load_tables(lut, thresholds, first, tables, limits)
        for j in range(width):
            descend_column(tile, j, hessian[j, j:], tables, limits, groups[j], shape[1] - 1, out,
                           current, width - j - 1)  # fmt: skip
        store_tile(out, first, codes)
        store_tile(current, first, moves)
