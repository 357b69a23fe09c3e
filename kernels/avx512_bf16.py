"""Rows of a sketch as bfloat16 by AVX-512: 32 columns at once, looked up among rounded entries.

The LUT is rounded once per group instead of each weight, and a look-up moves 16-bit words: one
`vpermw` for up to 32 entries, `vpermi2w` for 64, several of them and blends for more.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sketchconv.kernels.avx512_ir import (
    I8,
    I32,
    I64,
    LANES,
    VF32,
    VI32,
    call,
    field_bytes,
    keep_bytes,
    load,
    load_bytes,
    load_tables,
    plane_bytes,
    plane_starts,
    pointer,
    splat,
)
from sketchconv.kernels.avx512_woven import READERS, for_blocks
from sketchconv.kernels.orders import WOVEN
from sketchconv.kernels.planes import fields

COLUMNS = 32  # of one register
I16 = ir.IntType(16)
V16 = ir.VectorType(I16, COLUMNS)


def round_bf16(b: Any, value: Any) -> Any:
    """16 float32 rounded to bfloat16, in 16-bit words, as `entries.round_bf16` does."""
    word = b.bitcast(value, VI32)
    high = b.lshr(word, splat(16))
    odd = b.and_(high, splat(1))
    rounded = b.lshr(b.add(b.add(word, splat(0x7FFF)), odd), splat(16))
    nan = b.icmp_unsigned(">", b.and_(word, splat(0x7FFFFFFF)), splat(0x7F800000))
    rounded = b.select(nan, b.or_(high, splat(0x40)), rounded)
    return b.trunc(rounded, ir.VectorType(I16, LANES))


def _words(value: int) -> ir.Constant:
    return ir.Constant(V16, [value & 0xFFFF] * COLUMNS)


def _tables(b: Any, address: Any, bits: int, lut: str) -> list[Any]:
    """The LUT in registers of 32 bfloat16; short LUTs are repeated."""
    floats = load_tables(b, address, bits, lut)
    if bits <= 4:
        floats = floats[:1] * 2
    halves = [round_bf16(b, table) for table in floats]
    order = ir.Constant(ir.VectorType(I32, COLUMNS), list(range(COLUMNS)))
    return [b.shuffle_vector(*halves[i : i + 2], order) for i in range(0, len(halves), 2)]


def _lookup(b: Any, tables: list[Any], code: Any) -> Any:
    """`tables[code]` in every lane; bits of `code` above the LUT's size may hold anything."""
    if len(tables) == 1:
        return call(b, "llvm.x86.avx512.permvar.hi.512", V16, [tables[0], code])
    if len(tables) == 2:
        args = [tables[0], code, tables[1]]
        return call(b, "llvm.x86.avx512.vpermi2var.hi.512", V16, args)
    half = len(tables) // 2
    low, high = _lookup(b, tables[:half], code), _lookup(b, tables[half:], code)
    bit = b.and_(code, _words(half * COLUMNS))
    return b.select(b.icmp_unsigned("!=", bit, _words(0)), high, low)


def _fields(b: Any, width: int, address: Any, left: Any | None) -> Any:
    """The fields of one plane, 32 neighbouring columns, from bit 0 of a lane; above: anything."""
    count = 4 * width
    if left is None:
        raw = load(b, address, ir.VectorType(I8, count))
    else:
        raw = load_bytes(b, address, count, field_bytes(b, left, width))
    lane_bytes = [i * width // 8 for i in range(COLUMNS)]
    spread = b.shuffle_vector(raw, raw, ir.Constant(ir.VectorType(I32, COLUMNS), lane_bytes))
    shifts = ir.Constant(V16, [i * width % 8 for i in range(COLUMNS)])
    return b.lshr(b.zext(spread, V16), shifts)


def _codes(b: Any, bits: int, planes: list[Any], left: Any | None) -> Any:
    code, first = None, 0
    for width, address in zip(fields(bits), planes, strict=True):
        part = _fields(b, width, address, left)
        if code is None:
            code = part
        else:
            keep = 2**first - 1
            moved = b.and_(b.shl(part, _words(first)), _words(~keep))
            code = b.or_(b.and_(code, _words(keep)), moved)
        first += width
    return code


def _store(b: Any, value: Any, address: Any, left: Any | None) -> None:
    if left is None:
        b.store(value, pointer(b, address, V16), align=1)
        return
    args = [value, pointer(b, address, V16), I32(1), keep_bytes(b, left, COLUMNS)]
    call(b, "llvm.masked.store.v32i16.p0", ir.VoidType(), args)


def _emit_woven(b: Any, lut: str, args: list[Any]) -> list[Any]:
    """The woven blocks of a group; index, tables, target and columns of what is left."""
    index, tables_at, target, columns = args
    wide = [b.zext(round_bf16(b, table), VI32) for table in load_tables(b, tables_at, 3, lut)]
    tables = [b.bitcast(table, VF32) for table in wide]
    order = ir.Constant(ir.VectorType(I32, COLUMNS), list(range(0, 2 * COLUMNS, 2)))

    def decode(size: int, byte: Any, column: Any) -> None:
        to = b.add(target, b.mul(column, I64(2)))
        found = [b.bitcast(w, V16) for w in READERS[size](b, tables, b.add(index, byte))]
        for number, pair in enumerate(zip(found[::2], found[1::2], strict=True)):
            value = b.shuffle_vector(*pair, order)
            _store(b, value, b.add(to, I64(2 * COLUMNS * number)), None)

    size, done = for_blocks(b, columns, decode)
    to = b.add(target, b.mul(done, I64(2)))
    return [b.add(index, size), tables_at, to, b.sub(columns, done)]


def _emit(b: Any, bits: int, lut: str, order: str, args: list[Any]) -> None:
    """One group; see `decode_group_bf16` for the arguments."""
    index, tables_at, target, columns = _emit_woven(b, lut, args) if order == WOVEN else args
    tables = _tables(b, tables_at, bits, lut)
    starts = plane_starts(b, index, plane_bytes(b, bits, columns))
    full, tail = b.udiv(columns, I64(COLUMNS)), b.urem(columns, I64(COLUMNS))

    def decode(number: Any, left: Any | None) -> None:
        planes = [
            b.add(start, b.mul(number, I64(4 * width)))
            for width, start in zip(fields(bits), starts, strict=True)
        ]
        value = _lookup(b, tables, _codes(b, bits, planes, left))
        _store(b, value, b.add(target, b.mul(number, I64(2 * COLUMNS))), left)

    with cgutils.for_range(b, full) as loop:
        decode(loop.index, None)
    with b.if_then(b.icmp_unsigned(">", tail, I64(0))):
        decode(full, tail)


def _decode_group_bf16(
    typing: Any, bits: Any, lut: Any, order: Any, index: Any, tables: Any, target: Any, columns: Any
) -> Any:
    """Write the `columns` weights of one group to the address `target` as bfloat16."""
    static = (bits.literal_value, lut.literal_value, order.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _emit(builder, *static, list(args[3:]))
        return context.get_dummy_value()

    return types.void(bits, lut, order, *[types.int64] * 4), codegen


decode_group_bf16: Any = intrinsic(prefer_literal=True)(_decode_group_bf16)
