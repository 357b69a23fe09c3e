"""AVX-512 kernels on packed sketches, used as they lie on disk.

For the matrix-vector product it is the activation that is permuted, into the order in which a block
of weights leaves the registers (`avx512_blocks.py`, `avx512_order.py`), and never the weights. For
decoding to float32, 16 neighbouring columns are spread over the lanes in their natural order.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
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
BAND_PREFETCH_BYTES = 2048  # the same for several rows at once

# Running sums of a dot product: 4 keep the multipliers busy. Where several rows share an activation
# 2 do, and more would not stay in registers: the order of a row's sum must be one and the same.
BANDS = {2: 4, 3: 4, 4: 4}  # bits: rows at once for one activation, each a stream of its own


def _sums(bits: int) -> int:
    return 2 if bits in BANDS else 4


@dataclass(frozen=True, slots=True)
class _Dots:
    """Dot products of some rows with some activations, under way.

    `starts` are, by row, (address, bits of a field) of each plane of the group at work, and
    `tables` its LUT in registers; `xs` are the group's addresses in the activations, and
    ``sums[row][token]`` the running sums.
    """

    tables: list[list[Any]]
    starts: list[list[tuple[Any, int]]]
    xs: list[Any]
    sums: list[list[list[Any]]]

    def add(self, b: Any, block: Block, column: Any, left: Any) -> None:
        """`sums[row][token][j % len] += weight[j] * x[j]` over the vectors of one block.

        `left` is the number of columns in a last, short block, None in a full one.
        """
        planes = [
            [b.add(at, b.lshr(b.mul(column, I64(width)), I64(3))) for at, width in starts]
            for starts in self.starts
        ]
        if left is None:
            ahead = PREFETCH_BYTES if len(planes) == 1 else BAND_PREFETCH_BYTES
            for address in chain.from_iterable(planes):
                prefetch(b, b.add(address, I64(ahead)))
        xs = [b.add(x, b.mul(column, I64(4))) for x in self.xs]
        rows = [
            block.weights(b, tables, at, left)
            for tables, at in zip(self.tables, planes, strict=True)
        ]
        for number, weights in enumerate(zip(*rows, strict=True)):
            values = [load(b, b.add(x, I64(4 * LANES * number)), VF32) for x in xs]
            for weight, sums in zip(weights, self.sums, strict=True):
                for value, parts in zip(values, sums, strict=True):
                    total = parts[number % len(parts)]
                    args = [weight, value, b.load(total)]
                    b.store(call(b, "llvm.fma.v16f32", VF32, args), total)


def _prefetch_tables(b: Any, address: Any, size: int) -> None:
    """Of later rows: for short rows LUTs are a large part of what is read."""
    for line in range(0, size, 64):
        prefetch(b, b.add(address, I64(PREFETCH_BYTES + line)))


def _add_group(b: Any, plan: tuple[Block, ...], dots: _Dots, columns: Any) -> None:
    """Add one group of `columns` columns: blocks of each kind as they fit, and one short one."""
    done: Any = I64(0)
    for block in plan:
        first, size = done, I64(block.columns)
        rest = b.sub(b.sub(columns, first), I64(block.beyond))
        full = b.sdiv(b.select(b.icmp_signed(">", rest, I64(0)), rest, I64(0)), size)
        with cgutils.for_range(b, full) as loop:
            dots.add(b, block, b.add(first, b.mul(loop.index, size)), None)
        done = b.add(first, b.mul(full, size))
    left = b.sub(columns, done)
    with b.if_then(b.icmp_signed(">", left, I64(0))):
        dots.add(b, plan[-1], done, left)


def _emit_rows(
    b: Any, bits: int, lut: str, vbmi: int, count: int, tokens: int, args: list[Any]
) -> list[Any]:
    """`count` output rows for `tokens` activations; see `row_dots` for the arguments."""
    index, tables_at, x, stride, apart, groups, columns = args
    plan = blocks(bits, lut, bool(vbmi))
    sums = [
        [[local(b, VF32) for _ in range(_sums(bits))] for _ in range(tokens)] for _ in range(count)
    ]
    for total in (total for row in sums for parts in row for total in parts):
        b.store(ir.Constant(VF32, None), total)
    sizes = plane_bytes(b, bits, columns)
    group_bytes = sizes[0]
    for more in sizes[1:]:
        group_bytes = b.add(group_bytes, more)
    room = b.mul(padded(b, plan, columns), I64(4))
    lut_bytes = 2**bits * (4 if lut == "F32" else 2)
    rows = [b.mul(b.mul(apart, groups), I64(number)) for number in range(count)]
    bytewise = by_bytes(bits, lut, bool(vbmi))
    with cgutils.for_range(b, groups) as loop:
        numbers = [b.add(row, loop.index) for row in rows]
        luts = [b.add(tables_at, b.mul(number, I64(lut_bytes))) for number in numbers]
        codes = [b.add(index, b.mul(number, group_bytes)) for number in numbers]
        for at in luts:
            _prefetch_tables(b, at, lut_bytes)
        first = b.add(x, b.mul(loop.index, room))
        dots = _Dots(
            [
                load_byte_tables(b, at, bits) if bytewise else load_tables(b, at, bits, lut)
                for at in luts
            ],
            [list(zip(plane_starts(b, at, sizes), fields(bits), strict=True)) for at in codes],
            [b.add(first, b.mul(stride, I64(token))) for token in range(tokens)],
            sums,
        )
        _add_group(b, plan, dots, columns)
    return [sum_lanes(b, [b.load(total) for total in parts]) for row in sums for parts in row]


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
    count: Any,
    tokens: Any,
    index: Any,
    tables: Any,
    x: Any,
    stride: Any,
    apart: Any,
    groups: Any,
    columns: Any,
) -> Any:
    """Dot products of `count` rows with `tokens` permuted activations: a flat tuple of float32.

    `index`, `tables` and `x` are the addresses of the first row's codes, of its LUTs and of the
    activations, `stride` the bytes from one activation to the next, `apart` the rows from one
    row to the next, `columns` those of one group. A result does not depend on its companions.
    """
    given = (bits, lut, vbmi, count, tokens)
    width, kind, fast, rows, many = (value.literal_value for value in given)
    tuple_type: Any = types.UniTuple
    result = tuple_type(types.float32, rows * many)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = _emit_rows(builder, width, kind, fast, rows, many, list(args[5:]))
        return context.make_tuple(builder, result, values)

    return result(*given, *[types.int64] * 7), codegen


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
