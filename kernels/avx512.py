"""AVX-512 kernels on packed sketches, used as they lie on disk.

For the matrix-vector product a block of 128 columns (64 at 8 bits) of a plane is read as 16
little-endian words, one per lane: slot t of lane l holds column `slots * l + t` of the block. So it
is the activation that is permuted, once per call (see `gemv.py`), and never the weights. For
decoding, 16 neighbouring columns are spread over the lanes in their natural order.
"""

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
    VF32,
    VI32,
    call,
    field_bytes,
    keep_bytes,
    load,
    load_bytes,
    load_tables,
    local,
    lookup,
    merge,
    plane_bytes,
    plane_starts,
    pointer,
    slots,
    splat,
    sum_lanes,
)
from sketchconv.kernels.planes import fields

PREFETCH_BYTES = 4096  # ahead of the reads: doubled the speed of layers that come from DRAM


def _block_words(b: Any, address: Any, width: int, left: Any | None, bits: int) -> Any:
    """16 little-endian words of one plane, widened to 32 bits; only `left` bytes are read."""
    count = 2 * width * slots(bits)
    kind = ir.VectorType(ir.IntType(count // 2), LANES)
    if left is None:
        raw = load(b, address, kind)
    else:
        raw = b.bitcast(load_bytes(b, address, count, left), kind)
    return raw if count == 64 else b.zext(raw, VI32)


def _add_block(
    b: Any, bits: int, tables: list[Any], planes: list[Any], xs: list[Any], sums: Any, tail: Any
) -> None:
    """`sums[token][slot % 4] += lut[code] * x` over one block.

    `planes` and `xs` are addresses at the block's start; `tail` is the number of columns in a
    last, short block, None in a full one.
    """
    parts, first = [], 0
    for width, address in zip(fields(bits), planes, strict=True):
        left = None if tail is None else field_bytes(b, tail, width)
        if tail is None:
            ahead = pointer(b, b.add(address, I64(PREFETCH_BYTES)), ir.IntType(8))
            call(b, "llvm.prefetch.p0", ir.VoidType(), [ahead, I32(0), I32(3), I32(1)])
        parts.append((_block_words(b, address, width, left, bits), first))
        first += width
    for slot in range(slots(bits)):
        code = merge(b, parts, [slot * width for width in fields(bits)])
        weight = lookup(b, tables, code)
        for token, x in enumerate(xs):
            value = load(b, b.add(x, I64(4 * LANES * slot)), VF32)
            total = sums[token][slot % len(sums[token])]
            args = [weight, value, b.load(total)]
            b.store(call(b, "llvm.fma.v16f32", VF32, args), total)


def _emit_group(
    b: Any,
    bits: int,
    tables: list[Any],
    starts: list[Any],
    x: Any,
    stride: Any,
    sums: Any,
    columns: Any,
) -> None:
    """Add one group of one row to `sums`: full blocks, then the short one."""
    size = LANES * slots(bits)
    full, tail = b.udiv(columns, I64(size)), b.urem(columns, I64(size))

    def add(number: Any, short: Any) -> None:
        planes = [
            b.add(start, b.mul(number, I64(size * width // 8)))
            for start, width in zip(starts, fields(bits), strict=True)
        ]
        at = b.add(x, b.mul(number, I64(4 * size)))
        xs = [b.add(at, b.mul(stride, I64(token))) for token in range(len(sums))]
        _add_block(b, bits, tables, planes, xs, sums, short)

    with cgutils.for_range(b, full) as loop:
        add(loop.index, None)
    with b.if_then(b.icmp_unsigned(">", tail, I64(0))):
        add(full, tail)


def _emit_row(b: Any, bits: int, lut: str, tokens: int, args: list[Any]) -> list[Any]:
    """One output row for `tokens` activations; see `row_dots` for the arguments."""
    index, tables_at, x, stride, groups, columns = args
    sums = [[local(b, VF32) for _ in range(4)] for _ in range(tokens)]
    for total in (total for row in sums for total in row):
        b.store(ir.Constant(VF32, None), total)
    sizes = plane_bytes(b, bits, columns)
    group_bytes = sizes[0]
    for more in sizes[1:]:
        group_bytes = b.add(group_bytes, more)
    size = LANES * slots(bits)
    blocks = b.udiv(b.add(columns, I64(size - 1)), I64(size))
    lut_bytes = I64(2**bits * (4 if lut == "F32" else 2))
    with cgutils.for_range(b, groups) as group:
        tables = load_tables(b, b.add(tables_at, b.mul(group.index, lut_bytes)), bits, lut)
        starts = plane_starts(b, b.add(index, b.mul(group.index, group_bytes)), sizes)
        x_group = b.add(x, b.mul(b.mul(group.index, blocks), I64(4 * size)))
        _emit_group(b, bits, tables, starts, x_group, stride, sums, columns)
    return [sum_lanes(b, [b.load(total) for total in row]) for row in sums]


def _natural_codes(b: Any, width: int, address: Any, left: Any | None) -> Any:
    """The fields of one plane, 16 neighbouring columns in natural order, from bit 0 of a lane."""
    if left is None:
        raw = load(b, address, ir.VectorType(ir.IntType(8), 2 * width))
    else:
        raw = load_bytes(b, address, LANES, left)
    lane_bytes = ir.Constant(VI32, [i * width // 8 for i in range(LANES)])
    spread = b.zext(b.shuffle_vector(raw, raw, lane_bytes), VI32)
    return b.lshr(spread, ir.Constant(VI32, [i * width % 8 for i in range(LANES)]))


def _store_values(b: Any, value: Any, address: Any, out: str, left: Any | None) -> None:
    """Store 16 float32, as they are or rounded to bfloat16 as `entries.round_bf16` does."""
    if out == "BF16":
        word = b.bitcast(value, VI32)
        high = b.lshr(word, splat(16))
        odd = b.and_(high, splat(1))
        rounded = b.lshr(b.add(b.add(word, splat(0x7FFF)), odd), splat(16))
        nan = b.icmp_unsigned(">", b.and_(word, splat(0x7FFFFFFF)), splat(0x7F800000))
        rounded = b.select(nan, b.or_(high, splat(0x40)), rounded)
        value = b.trunc(rounded, ir.VectorType(ir.IntType(16), LANES))
    if left is None:
        b.store(value, pointer(b, address, value.type), align=1)
        return
    mask = keep_bytes(b, left, LANES)
    name = "llvm.masked.store.v16i16.p0" if out == "BF16" else "llvm.masked.store.v16f32.p0"
    call(b, name, ir.VoidType(), [value, pointer(b, address, value.type), I32(1), mask])


def _emit_decode(b: Any, bits: int, lut: str, out: str, args: list[Any]) -> None:
    """Weights of one group in natural order; see `decode_group` for the arguments."""
    index, tables_at, target, columns = args
    tables = load_tables(b, tables_at, bits, lut)
    starts = plane_starts(b, index, plane_bytes(b, bits, columns))
    full, tail = b.udiv(columns, I64(LANES)), b.urem(columns, I64(LANES))

    def decode(number: Any, short: Any) -> None:
        parts, first = [], 0
        for width, start in zip(fields(bits), starts, strict=True):
            left = None if short is None else field_bytes(b, short, width)
            at = b.add(start, b.mul(number, I64(2 * width)))
            parts.append((_natural_codes(b, width, at, left), first))
            first += width
        value = lookup(b, tables, merge(b, parts, [0] * len(parts)))
        at = b.add(target, b.mul(number, I64(LANES * (2 if out == "BF16" else 4))))
        _store_values(b, value, at, out, short)

    with cgutils.for_range(b, full) as loop:
        decode(loop.index, None)
    with b.if_then(b.icmp_unsigned(">", tail, I64(0))):
        decode(full, tail)


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
    """Dot products of one row with 1 or 2 permuted activations, as a tuple of float32.

    `index`, `tables` and `x` are the addresses of the row's codes, of its LUTs and of the
    activations, `stride` the bytes from one activation to the next, `columns` those of one group.
    """
    static = (bits.literal_value, lut.literal_value, tokens.literal_value)
    tuple_type: Any = types.UniTuple
    result = tuple_type(types.float32, static[2])

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.make_tuple(builder, result, _emit_row(builder, *static, list(args[3:])))

    return result(bits, lut, tokens, *[types.int64] * 6), codegen


def _decode_group(
    typing: Any,
    bits: Any,
    lut: Any,
    out: Any,
    index: Any,
    tables: Any,
    target: Any,
    columns: Any,
) -> Any:
    """Write the `columns` weights of one group to the address `target`, as F32 or BF16."""
    static = (bits.literal_value, lut.literal_value, out.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _emit_decode(builder, *static, list(args[3:]))
        return context.get_dummy_value()

    return types.void(bits, lut, out, *[types.int64] * 4), codegen


row_dots: Any = intrinsic(prefer_literal=True)(_row_dots)
decode_group: Any = intrinsic(prefer_literal=True)(_decode_group)
