"""Rows of a packed sketch times activations by AVX-512, from codes as they lie in memory.

It is the activation that is permuted, into the order in which a block of weights leaves the
registers (`avx512_plan.py`, `avx512_order.py`), and never the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sketchconv.kernels.avx512_blocks import Block
from sketchconv.kernels.avx512_ir import (
    I64,
    LANES,
    VF32,
    call,
    load,
    load_byte_tables,
    load_tables,
    local,
    plane_bytes,
    plane_starts,
    prefetch,
    sum_lanes,
)
from sketchconv.kernels.avx512_order import padded
from sketchconv.kernels.avx512_plan import blocks, by_bytes, running_sums
from sketchconv.kernels.avx512_woven import for_blocks
from sketchconv.kernels.orders import WOVEN
from sketchconv.kernels.planes import fields

PREFETCH_BYTES = 4096  # ahead of the reads: doubled the speed of layers that come from DRAM
BAND_PREFETCH_BYTES = 2048  # the same for several rows at once


@dataclass(frozen=True, slots=True)
class Dots:
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
                for line in range(block.lines):
                    prefetch(b, b.add(address, I64(ahead + 64 * line)))
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


def add_woven(b: Any, plan: tuple[Block, ...], dots: Dots, columns: Any) -> None:
    """Add one group in the order `woven`; `dots` starts at its woven blocks."""
    kinds = {block.columns: block for block in plan[:-1]}
    size, done = for_blocks(b, columns, lambda of, _, at: dots.add(b, kinds[of], at, None))
    rest = b.sub(columns, done)
    sizes = plane_bytes(b, 3, rest)
    planes = [
        list(zip(plane_starts(b, b.add(start[0][0], size), sizes), fields(3), strict=True))
        for start in dots.starts
    ]
    xs = [b.add(x, b.mul(done, I64(4))) for x in dots.xs]
    add_group(b, plan[-1:], replace(dots, starts=planes, xs=xs), rest)


def add_group(b: Any, plan: tuple[Block, ...], dots: Dots, columns: Any) -> None:
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
    b: Any, bits: int, lut: str, way: str, count: int, tokens: int, args: list[Any]
) -> list[Any]:
    """`count` output rows for `tokens` activations; see `row_dots` for the arguments."""
    index, tables_at, x, stride, apart, groups, columns = args
    plan = blocks(bits, lut, way)
    totals = [
        [[local(b, VF32) for _ in range(running_sums(bits, way))] for _ in range(tokens)]
        for _ in range(count)
    ]
    for total in (total for row in totals for parts in row for total in parts):
        b.store(ir.Constant(VF32, None), total)
    sizes = plane_bytes(b, bits, columns)
    group_bytes = sizes[0]
    for more in sizes[1:]:
        group_bytes = b.add(group_bytes, more)
    room = b.mul(padded(b, plan, columns), I64(4))
    lut_bytes = 2**bits * (4 if lut == "F32" else 2)
    rows = [b.mul(b.mul(apart, groups), I64(number)) for number in range(count)]
    bytewise, woven = by_bytes(bits, way), way == WOVEN
    with cgutils.for_range(b, groups) as loop:
        numbers = [b.add(row, loop.index) for row in rows]
        luts = [b.add(tables_at, b.mul(number, I64(lut_bytes))) for number in numbers]
        codes = [b.add(index, b.mul(number, group_bytes)) for number in numbers]
        for at in luts:
            _prefetch_tables(b, at, lut_bytes)
        first = b.add(x, b.mul(loop.index, room))
        dots = Dots(
            [
                load_byte_tables(b, at, bits) if bytewise else load_tables(b, at, bits, lut)
                for at in luts
            ],
            [
                [(at, bits)]
                if woven
                else list(zip(plane_starts(b, at, sizes), fields(bits), strict=True))
                for at in codes
            ],
            [b.add(first, b.mul(stride, I64(token))) for token in range(tokens)],
            totals,
        )
        (add_woven if woven else add_group)(b, plan, dots, columns)
    return [sum_lanes(b, [b.load(total) for total in parts]) for row in totals for parts in row]


def _row_dots(
    typing: Any,
    bits: Any,
    lut: Any,
    way: Any,
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
    given = (bits, lut, way, count, tokens)
    width, kind, how, rows, many = (value.literal_value for value in given)
    tuple_type: Any = types.UniTuple
    result = tuple_type(types.float32, rows * many)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = _emit_rows(builder, width, kind, how, rows, many, list(args[5:]))
        return context.make_tuple(builder, result, values)

    return result(*given, *[types.int64] * 7), codegen


row_dots: Any = intrinsic(prefer_literal=True)(_row_dots)
