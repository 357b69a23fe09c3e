"""The AVX2 product of one row of a packed sketch with activations, as a Numba intrinsic."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sketchconv.kernels.avx2_blocks import COLUMNS, LANES, VF32, load_tables, weights
from sketchconv.kernels.avx512_ir import (
    I8,
    I32,
    I64,
    call,
    field_bytes,
    load,
    local,
    plane_bytes,
    plane_starts,
    pointer,
    prefetch,
)
from sketchconv.kernels.planes import fields

PREFETCH_BYTES = 4096  # ahead of the reads, as for AVX-512
SUMS = 4


def _copy_tail(b: Any, planes: list[Any], bits: int, columns: Any) -> list[Any]:
    """Planes of a short block, byte by byte into a whole block of zeros: AVX2 cannot mask loads."""
    copies = []
    for width, plane in zip(fields(bits), planes, strict=True):
        kind = ir.ArrayType(I8, COLUMNS * width // 8)
        room = local(b, kind)
        b.store(ir.Constant(kind, None), room)
        at = b.ptrtoint(room, I64)
        with cgutils.for_range(b, field_bytes(b, columns, width)) as loop:
            byte = load(b, b.add(plane, loop.index), I8)
            b.store(byte, pointer(b, b.add(at, loop.index), I8))
        copies.append(at)
    return copies


def _emit_group(
    b: Any, bits: int, tables: Any, starts: list[Any], x: Any, stride: Any, sums: Any, columns: Any
) -> None:
    """Add one group of one row to `sums`; `starts` are the addresses of its planes."""

    def add(planes: list[Any], at: Any) -> None:
        first = b.add(x, b.mul(at, I64(4 * COLUMNS)))
        xs = [b.add(first, b.mul(stride, I64(token))) for token in range(len(sums))]
        for number, weight in enumerate(weights(b, bits, tables, planes)):
            for token, start in enumerate(xs):
                value = load(b, b.add(start, I64(4 * LANES * number)), VF32)
                total = sums[token][number % SUMS]
                args = [weight, value, b.load(total)]
                b.store(call(b, "llvm.fma.v8f32", VF32, args), total)

    def planes_at(number: Any) -> list[Any]:
        return [
            b.add(start, b.mul(number, I64(COLUMNS * width // 8)))
            for start, width in zip(starts, fields(bits), strict=True)
        ]

    full, tail = b.udiv(columns, I64(COLUMNS)), b.urem(columns, I64(COLUMNS))
    with cgutils.for_range(b, full) as loop:
        planes = planes_at(loop.index)
        for plane in planes:
            prefetch(b, b.add(plane, I64(PREFETCH_BYTES)))
        add(planes, loop.index)
    with b.if_then(b.icmp_unsigned(">", tail, I64(0))):
        add(_copy_tail(b, planes_at(full), bits, tail), full)


def _sum_lanes(b: Any, sums: list[Any]) -> Any:
    while len(sums) > 1:
        sums = [b.fadd(low, high) for low, high in zip(sums[::2], sums[1::2], strict=True)]
    value, lanes = sums[0], LANES
    while lanes > 1:
        lanes //= 2
        kind = ir.VectorType(I32, lanes)
        halves = [
            b.shuffle_vector(value, value, ir.Constant(kind, list(range(i, i + lanes))))
            for i in (0, lanes)
        ]
        value = b.fadd(*halves)
    return b.extract_element(value, I32(0))


def _emit_row(b: Any, bits: int, lut: str, tokens: int, args: list[Any]) -> list[Any]:
    """One output row for `tokens` activations; see `row_dots` for the arguments."""
    index, tables_at, x, stride, groups, columns = args
    sums = [[local(b, VF32) for _ in range(SUMS)] for _ in range(tokens)]
    for total in (total for row in sums for total in row):
        b.store(ir.Constant(VF32, None), total)
    sizes = plane_bytes(b, bits, columns)
    group_bytes = sizes[0]
    for more in sizes[1:]:
        group_bytes = b.add(group_bytes, more)
    blocks = b.udiv(b.add(columns, I64(COLUMNS - 1)), I64(COLUMNS))
    lut_bytes = 2**bits * (4 if lut == "F32" else 2)
    with cgutils.for_range(b, groups) as group:
        at = b.add(tables_at, b.mul(group.index, I64(lut_bytes)))
        for line in range(0, lut_bytes, 64):
            prefetch(b, b.add(at, I64(PREFETCH_BYTES + line)))
        tables = load_tables(b, at, bits, lut)
        starts = plane_starts(b, b.add(index, b.mul(group.index, group_bytes)), sizes)
        x_group = b.add(x, b.mul(b.mul(group.index, blocks), I64(4 * COLUMNS)))
        _emit_group(b, bits, tables, starts, x_group, stride, sums, columns)
    return [_sum_lanes(b, [b.load(total) for total in row]) for row in sums]


def _row_dots(
    typing: Any,
    bits: Any,
    lut: Any,
    tokens: Any,
    index: Any,
    tables: Any,
    x: Any,
    stride: Any,
    groups: Any,
    columns: Any,
) -> Any:
    """Dot products of one row with 1 or 2 ordered activations, as a tuple of float32.

    `index`, `tables` and `x` are the addresses of the row's codes, of its LUTs and of the
    activations, `stride` the bytes from one activation to the next, `columns` those of one group.
    """
    static = bits.literal_value, lut.literal_value, tokens.literal_value
    tuple_type: Any = types.UniTuple
    result = tuple_type(types.float32, tokens.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.make_tuple(builder, result, _emit_row(builder, *static, list(args[3:])))

    return result(bits, lut, tokens, *[types.int64] * 6), codegen


row_dots: Any = intrinsic(prefer_literal=True)(_row_dots)
