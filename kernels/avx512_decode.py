"""Rows of a packed sketch as float32 by AVX-512: 16 neighbouring columns at once."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sketchconv.kernels.avx512_ir import (
    I32,
    I64,
    LANES,
    VI32,
    call,
    field_bytes,
    keep_bytes,
    load,
    load_bytes,
    load_tables,
    lookup,
    merge,
    plane_bytes,
    plane_starts,
    pointer,
)
from sketchconv.kernels.avx512_woven import READERS, for_blocks
from sketchconv.kernels.orders import WOVEN
from sketchconv.kernels.planes import fields


def _natural_codes(b: Any, width: int, address: Any, left: Any | None) -> Any:
    """The fields of one plane, 16 neighbouring columns in natural order, from bit 0 of a lane."""
    if left is None:
        raw = load(b, address, ir.VectorType(ir.IntType(8), 2 * width))
    else:
        raw = load_bytes(b, address, LANES, left)
    lane_bytes = ir.Constant(VI32, [i * width // 8 for i in range(LANES)])
    spread = b.zext(b.shuffle_vector(raw, raw, lane_bytes), VI32)
    return b.lshr(spread, ir.Constant(VI32, [i * width % 8 for i in range(LANES)]))


def _store_values(b: Any, value: Any, address: Any, left: Any | None) -> None:
    """Store 16 float32."""
    if left is None:
        b.store(value, pointer(b, address, value.type), align=1)
        return
    args = [value, pointer(b, address, value.type), I32(1), keep_bytes(b, left, LANES)]
    call(b, "llvm.masked.store.v16f32.p0", ir.VoidType(), args)


def _emit_woven(b: Any, tables: list[Any], args: list[Any]) -> list[Any]:
    """The woven blocks of a group; the rest of the arguments: index, target, columns."""
    index, target, columns = args

    def decode(size: int, byte: Any, column: Any) -> None:
        to = b.add(target, b.mul(column, I64(4)))
        for number, weight in enumerate(READERS[size](b, tables, b.add(index, byte))):
            _store_values(b, weight, b.add(to, I64(4 * LANES * number)), None)

    size, done = for_blocks(b, columns, decode)
    return [b.add(index, size), b.add(target, b.mul(done, I64(4))), b.sub(columns, done)]


def _emit_decode(b: Any, bits: int, lut: str, order: str, args: list[Any]) -> None:
    """Weights of one group in natural order; see `decode_group` for the arguments."""
    index, tables_at, target, columns = args
    tables = load_tables(b, tables_at, bits, lut)
    if order == WOVEN:
        index, target, columns = _emit_woven(b, tables, [index, target, columns])
    starts = plane_starts(b, index, plane_bytes(b, bits, columns))
    full, tail = b.udiv(columns, I64(LANES)), b.urem(columns, I64(LANES))

    def decode(number: Any, short: Any) -> None:
        parts, first = [], 0
        for width, start in zip(fields(bits), starts, strict=True):
            left = None if short is None else field_bytes(b, short, width)
            at = b.add(start, b.mul(number, I64(2 * width)))
            parts.append((_natural_codes(b, width, at, left), first))
            first += width
        code = merge(b, parts, [0] * len(parts))
        value = lookup(b, tables if bits > 3 else tables[:1], code)
        at = b.add(target, b.mul(number, I64(4 * LANES)))
        _store_values(b, value, at, short)

    with cgutils.for_range(b, full) as loop:
        decode(loop.index, None)
    with b.if_then(b.icmp_unsigned(">", tail, I64(0))):
        decode(full, tail)


def _decode_group(
    typing: Any, bits: Any, lut: Any, order: Any, index: Any, tables: Any, target: Any, columns: Any
) -> Any:
    """Write the `columns` weights of one group to the address `target` as float32."""
    static = (bits.literal_value, lut.literal_value, order.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _emit_decode(builder, *static, list(args[3:]))
        return context.get_dummy_value()

    return types.void(bits, lut, order, *[types.int64] * 4), codegen


decode_group: Any = intrinsic(prefer_literal=True)(_decode_group)
