"""AVX-512 kernels on packed sketches, used as they lie on disk.

For the matrix-vector product it is the activation that is permuted, into the order in which a block
of weights leaves the registers (`avx512_blocks.py`, `avx512_order.py`), and never the weights. For
decoding to float32, 16 neighbouring columns are spread over the lanes in their natural order.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sketchconv.kernels.avx512_blocks import Block, blocks, by_bytes
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
    load_byte_tables,
    load_bytes,
    load_tables,
    local,
    lookup,
    merge,
    plane_bytes,
    plane_starts,
    pointer,
    prefetch,
    sum_lanes,
)
from sketchconv.kernels.avx512_order import padded
from sketchconv.kernels.planes import fields

PREFETCH_BYTES = 4096  # ahead of the reads: doubled the speed of layers that come from DRAM
SUMS = 4  # running sums of a token: enough to keep the multipliers busy


def _prefetch_tables(b: Any, address: Any, size: int) -> None:
    """Of later rows: for short rows LUTs are a large part of what is read."""
    for line in range(0, size, 64):
        prefetch(b, b.add(address, I64(PREFETCH_BYTES + line)))


def _add_block(
    b: Any, block: Block, tables: list[Any], planes: list[Any], xs: list[Any], sums: Any, left: Any
) -> None:
    """`sums[token][j % SUMS] += weight[j] * x[j]` over the vectors of one block.

    `planes` and `xs` are addresses at the block's start; `left` is the number of columns in a
    last, short block, None in a full one.
    """
    if left is None:
        for address in planes:
            prefetch(b, b.add(address, I64(PREFETCH_BYTES)))
    for number, weight in enumerate(block.weights(b, tables, planes, left)):
        for token, x in enumerate(xs):
            value = load(b, b.add(x, I64(4 * LANES * number)), VF32)
            total = sums[token][number % SUMS]
            args = [weight, value, b.load(total)]
            b.store(call(b, "llvm.fma.v16f32", VF32, args), total)


def _emit_group(
    b: Any,
    plan: tuple[Block, ...],
    tables: list[Any],
    starts: list[tuple[Any, int]],
    x: Any,
    stride: Any,
    sums: Any,
    columns: Any,
) -> None:
    """Add one group of one row to `sums`; `starts` are (address, bits of a field) by plane."""

    def planes_at(column: Any) -> list[Any]:
        return [b.add(start, b.lshr(b.mul(column, I64(width)), I64(3))) for start, width in starts]

    def xs_at(column: Any) -> list[Any]:
        first = b.add(x, b.mul(column, I64(4)))
        return [b.add(first, b.mul(stride, I64(token))) for token in range(len(sums))]

    done: Any = I64(0)
    for block in plan:
        first, size = done, I64(block.columns)
        rest = b.sub(b.sub(columns, first), I64(block.beyond))
        full = b.sdiv(b.select(b.icmp_signed(">", rest, I64(0)), rest, I64(0)), size)
        with cgutils.for_range(b, full) as loop:
            at = b.add(first, b.mul(loop.index, size))
            _add_block(b, block, tables, planes_at(at), xs_at(at), sums, None)
        done = b.add(first, b.mul(full, size))
    left = b.sub(columns, done)
    with b.if_then(b.icmp_signed(">", left, I64(0))):
        _add_block(b, plan[-1], tables, planes_at(done), xs_at(done), sums, left)


def _emit_row(b: Any, bits: int, lut: str, vbmi: int, tokens: int, args: list[Any]) -> list[Any]:
    """One output row for `tokens` activations; see `row_dots` for the arguments."""
    index, tables_at, x, stride, groups, columns = args
    plan = blocks(bits, lut, bool(vbmi))
    sums = [[local(b, VF32) for _ in range(SUMS)] for _ in range(tokens)]
    for total in (total for row in sums for total in row):
        b.store(ir.Constant(VF32, None), total)
    sizes = plane_bytes(b, bits, columns)
    group_bytes = sizes[0]
    for more in sizes[1:]:
        group_bytes = b.add(group_bytes, more)
    room = b.mul(padded(b, plan, columns), I64(4))
    lut_bytes = 2**bits * (4 if lut == "F32" else 2)
    with cgutils.for_range(b, groups) as group:
        at = b.add(tables_at, b.mul(group.index, I64(lut_bytes)))
        _prefetch_tables(b, at, lut_bytes)
        if by_bytes(bits, lut, bool(vbmi)):
            tables = load_byte_tables(b, at, bits)
        else:
            tables = load_tables(b, at, bits, lut)
        starts = plane_starts(b, b.add(index, b.mul(group.index, group_bytes)), sizes)
        planes = list(zip(starts, fields(bits), strict=True))
        x_group = b.add(x, b.mul(group.index, room))
        _emit_group(b, plan, tables, planes, x_group, stride, sums, columns)
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


def _store_values(b: Any, value: Any, address: Any, left: Any | None) -> None:
    """Store 16 float32."""
    if left is None:
        b.store(value, pointer(b, address, value.type), align=1)
        return
    args = [value, pointer(b, address, value.type), I32(1), keep_bytes(b, left, LANES)]
    call(b, "llvm.masked.store.v16f32.p0", ir.VoidType(), args)


def _emit_decode(b: Any, bits: int, lut: str, args: list[Any]) -> None:
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
        code = merge(b, parts, [0] * len(parts))
        value = lookup(b, tables if bits > 3 else tables[:1], code)
        at = b.add(target, b.mul(number, I64(4 * LANES)))
        _store_values(b, value, at, short)

    with cgutils.for_range(b, full) as loop:
        decode(loop.index, None)
    with b.if_then(b.icmp_unsigned(">", tail, I64(0))):
        decode(full, tail)


def _row_dots(
    typing: Any,
    bits: Any,
    lut: Any,
    vbmi: Any,
    tokens: Any,
    index: Any,
    tables: Any,
    x: Any,
    stride: Any,
    groups: Any,
    columns: Any,
) -> Any:
    """Dot products of one row with 1, 2 or 4 permuted activations, as a tuple of float32.

    `index`, `tables` and `x` are the addresses of the row's codes, of its LUTs and of the
    activations, `stride` the bytes from one activation to the next, `columns` those of one group.
    """
    static = bits.literal_value, lut.literal_value, vbmi.literal_value, tokens.literal_value
    tuple_type: Any = types.UniTuple
    result = tuple_type(types.float32, tokens.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.make_tuple(builder, result, _emit_row(builder, *static, list(args[4:])))

    return result(bits, lut, vbmi, tokens, *[types.int64] * 6), codegen


def _decode_group(
    typing: Any, bits: Any, lut: Any, index: Any, tables: Any, target: Any, columns: Any
) -> Any:
    """Write the `columns` weights of one group to the address `target` as float32."""
    static = (bits.literal_value, lut.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _emit_decode(builder, *static, list(args[2:]))
        return context.get_dummy_value()

    return types.void(bits, lut, *[types.int64] * 4), codegen


row_dots: Any = intrinsic(prefer_literal=True)(_row_dots)
decode_group: Any = intrinsic(prefer_literal=True)(_decode_group)
