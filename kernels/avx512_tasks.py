"""One row of codes times several activations, each with a LUT of its own, by AVX-512.

The codes are loaded and taken apart once: the look-ups of all tasks share them. The sums are those
of `avx512.row_dots`, in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sketchconv.kernels.avx512 import PREFETCH_BYTES, Dots, add_group, add_woven
from sketchconv.kernels.avx512_blocks import Block
from sketchconv.kernels.avx512_ir import (
    I64,
    LANES,
    VF32,
    call,
    load,
    load_tables,
    local,
    plane_bytes,
    plane_starts,
    prefetch,
    sum_lanes,
)
from sketchconv.kernels.avx512_order import padded
from sketchconv.kernels.avx512_plan import blocks, running_sums
from sketchconv.kernels.orders import WOVEN
from sketchconv.kernels.planes import fields


@dataclass(frozen=True, slots=True)
class PairedDots(Dots):
    """One row with the LUTs of several tasks: ``tables[t]`` and ``sums[t][0]`` go with ``xs[t]``.

    `starts` has one entry, the row's; LLVM finds that the look-ups of all tasks share the codes.
    """

    def add(self, b: Any, block: Block, column: Any, left: Any) -> None:
        """As `Dots.add`, each activation with the weights of its own task."""
        planes = [
            b.add(at, b.lshr(b.mul(column, I64(width)), I64(3))) for at, width in self.starts[0]
        ]
        if left is None:
            for address in planes:
                for line in range(block.lines):
                    prefetch(b, b.add(address, I64(PREFETCH_BYTES + 64 * line)))
        xs = [b.add(x, b.mul(column, I64(4))) for x in self.xs]
        tasks = [block.weights(b, tables, planes, left) for tables in self.tables]
        for number, weights in enumerate(zip(*tasks, strict=True)):
            for weight, x, sums in zip(weights, xs, self.sums, strict=True):
                total = sums[0][number % len(sums[0])]
                value = load(b, b.add(x, I64(4 * LANES * number)), VF32)
                b.store(call(b, "llvm.fma.v16f32", VF32, [weight, value, b.load(total)]), total)


def _emit(b: Any, bits: int, lut: str, way: str, tasks: int, args: list[Any]) -> list[Any]:
    """Dot products of one row; see `task_dots` for the arguments."""
    index, luts_at, offset, x, stride, groups, columns = args
    plan = blocks(bits, lut, way)
    totals = [[[local(b, VF32) for _ in range(running_sums(bits, way))]] for _ in range(tasks)]
    for total in (total for row in totals for parts in row for total in parts):
        b.store(ir.Constant(VF32, None), total)
    sizes = plane_bytes(b, bits, columns)
    group_bytes = sizes[0]
    for more in sizes[1:]:
        group_bytes = b.add(group_bytes, more)
    room = b.mul(padded(b, plan, columns), I64(4))
    lut_bytes = I64(2**bits * (4 if lut == "F32" else 2))
    bases = [b.add(load(b, b.add(luts_at, I64(8 * t)), I64), offset) for t in range(tasks)]
    with cgutils.for_range(b, groups) as loop:
        at = b.add(index, b.mul(loop.index, group_bytes))
        first, skip = b.add(x, b.mul(loop.index, room)), b.mul(loop.index, lut_bytes)
        starts = list(zip(plane_starts(b, at, sizes), fields(bits), strict=True))
        dots = PairedDots(
            [load_tables(b, b.add(base, skip), bits, lut) for base in bases],
            [[(at, bits)] if way == WOVEN else starts],
            [b.add(first, b.mul(stride, I64(task))) for task in range(tasks)],
            totals,
        )
        (add_woven if way == WOVEN else add_group)(b, plan, dots, columns)
    return [sum_lanes(b, [b.load(total) for total in parts]) for row in totals for parts in row]


def _task_dots(
    typing: Any,
    bits: Any,
    lut: Any,
    way: Any,
    tasks: Any,
    index: Any,
    luts: Any,
    offset: Any,
    x: Any,
    stride: Any,
    groups: Any,
    columns: Any,
) -> Any:
    """Dot products of one row with `tasks` permuted activations: a flat tuple of float32.

    `index` is the address of the row's codes, `luts` that of `tasks` addresses of LUTs, the row's
    `offset` bytes after each; `x`, `stride`, `groups` and `columns` are as in `avx512.row_dots`.
    """
    given = (bits, lut, way, tasks)
    width, kind, how, many = (value.literal_value for value in given)
    tuple_type: Any = types.UniTuple
    result = tuple_type(types.float32, many)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = _emit(builder, width, kind, how, many, list(args[4:]))
        return context.make_tuple(builder, result, values)

    return result(*given, *[types.int64] * 7), codegen


task_dots: Any = intrinsic(prefer_literal=True)(_task_dots)
