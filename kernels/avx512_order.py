"""Activations in the order in which AVX-512 blocks yield their weights (`avx512_plan.py`).

A block of activations stays in registers: it is brought into order by rounds of two-register
shuffles, about 0.15 ns per activation, where a loop over single elements takes 2 ns.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sketchconv.kernels.avx512_blocks import Block
from sketchconv.kernels.avx512_ir import I32, I64, LANES, VI32, call, local, pointer, splat
from sketchconv.kernels.avx512_plan import blocks


def reorder(b: Any, vectors: list[Any], order: tuple[int, ...]) -> list[Any]:
    """Registers whose element `j` is element ``order[j]`` of `vectors`, 16 elements each.

    Each round parts the elements of pairs of registers by one bit of the number of the register
    that they go to, so that after the last round each register holds its own.
    """
    place = {column: at for at, column in enumerate(order)}
    registers = [(v, list(range(LANES * i, LANES * (i + 1)))) for i, v in enumerate(vectors)]
    for bit in range((len(vectors) - 1).bit_length()):
        waiting, registers = registers, []
        while waiting:
            low, first = waiting.pop(0)
            high, second = waiting.pop(_partner(first, waiting, place, bit))
            both = first + second
            for side in range(2):
                chosen = [c for c in both if place[c] // LANES >> bit & 1 == side]
                chosen.sort(key=lambda column: place[column])
                picks = ir.Constant(VI32, [both.index(column) for column in chosen])
                registers.append((b.shuffle_vector(low, high, picks), chosen))
    registers.sort(key=lambda register: place[register[1][0]])
    return [vector for vector, _ in registers]


def _partner(
    columns: list[int], others: list[tuple[Any, list[int]]], place: dict[int, int], bit: int
) -> int:
    """Number of the register that is to be parted together with the one that holds `columns`.

    Raises:
        ValueError: there is none; this order needs another way.
    """
    settled = {place[c] // LANES % (1 << bit) for c in columns}
    for number, (_, more) in enumerate(others):
        ones = sum(place[c] // LANES >> bit & 1 for c in columns + more)
        if ones == LANES and {place[c] // LANES % (1 << bit) for c in more} == settled:
            return number
    raise ValueError(f"no register goes with {columns} at bit {bit}")


def padded(b: Any, plan: tuple[Block, ...], columns: Any) -> Any:
    """Columns of a group, with those that fill its last block."""
    done = I64(0)
    for block in plan[:-1]:
        full = b.udiv(b.sub(columns, done), I64(block.columns))
        done = b.add(done, b.mul(full, I64(block.columns)))
    size = plan[-1].columns
    count = b.udiv(b.add(b.sub(columns, done), I64(size - 1)), I64(size))
    return b.add(done, b.mul(count, I64(size)))


def _load_some(b: Any, address: Any, size: int, left: Any) -> Any:
    """16 words of `size` bytes; those beyond the first `left` are zeros, and are not read."""
    kind = ir.VectorType(ir.IntType(8 * size), LANES)
    some = b.select(b.icmp_signed(">", left, I64(0)), left, I64(0))
    few = b.select(b.icmp_signed("<", some, I64(LANES)), some, I64(LANES))
    flags = b.trunc(b.sub(b.shl(I64(1), few), I64(1)), ir.IntType(LANES))
    mask = b.bitcast(flags, ir.VectorType(ir.IntType(1), LANES))
    args = [pointer(b, address, kind), I32(1), mask, ir.Constant(kind, None)]
    return call(b, f"llvm.masked.load.v16i{8 * size}.p0", kind, args)


def _block(b: Any, block: Block, half: Any, x: Any, target: Any, left: Any) -> None:
    """Put one block at `target`; of the activations from `x` on only `left` are read."""
    starts = range(0, block.columns, LANES)
    found = [local(b, VI32) for _ in starts]
    with b.if_else(half) as (then, otherwise):
        with then:
            for place, first in zip(found, starts, strict=True):
                raw = _load_some(b, b.add(x, I64(2 * first)), 2, b.sub(left, I64(first)))
                b.store(b.shl(b.zext(raw, VI32), splat(16)), place)
        with otherwise:
            for place, first in zip(found, starts, strict=True):
                raw = _load_some(b, b.add(x, I64(4 * first)), 4, b.sub(left, I64(first)))
                b.store(raw, place)
    vectors = [b.load(place) for place in found]
    for number, vector in enumerate(reorder(b, vectors, block.order)):
        b.store(vector, pointer(b, b.add(target, I64(4 * LANES * number)), VI32), align=4)


def _emit_group(
    b: Any, plan: tuple[Block, ...], half: Any, x: Any, target: Any, columns: Any
) -> None:
    """One group of one activation, in the blocks' order and with zeros up to whole blocks."""
    done: Any = I64(0)
    for block in plan:
        size = block.columns
        left = b.sub(columns, done)
        count = b.udiv(left if block is not plan[-1] else b.add(left, I64(size - 1)), I64(size))
        with cgutils.for_range(b, count) as loop:
            at = b.add(done, b.mul(loop.index, I64(size)))
            source = b.add(x, b.select(half, b.mul(at, I64(2)), b.mul(at, I64(4))))
            to = b.add(target, b.mul(at, I64(4)))
            _block(b, block, half, source, to, b.sub(columns, at))
        done = b.add(done, b.mul(count, I64(size)))


def _arrange(
    typing: Any,
    bits: Any,
    lut: Any,
    way: Any,
    half: Any,
    x: Any,
    target: Any,
    count: Any,
    columns: Any,
) -> Any:
    """Put `count` groups of `columns` activations, at the address `x`, into the blocks' order.

    `x` holds float32 or (`half`) bfloat16, `target` has room for `padded_columns` float32 a group.
    """
    plan = blocks(bits.literal_value, lut.literal_value, way.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        b = builder
        short, source, into, groups, width = args[3:]
        room = b.mul(padded(b, plan, width), I64(4))
        step = b.mul(width, b.select(short, I64(2), I64(4)))
        with cgutils.for_range(b, groups) as group:
            at = b.add(source, b.mul(group.index, step))
            _emit_group(b, plan, short, at, b.add(into, b.mul(group.index, room)), width)
        return context.get_dummy_value()

    return types.void(bits, lut, way, types.boolean, *[types.int64] * 4), codegen


def _padded_columns(typing: Any, bits: Any, lut: Any, way: Any, columns: Any) -> Any:
    """Columns of a group, with those that fill its last block."""
    plan = blocks(bits.literal_value, lut.literal_value, way.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return padded(builder, plan, args[3])

    return types.int64(bits, lut, way, types.int64), codegen


arrange: Any = intrinsic(prefer_literal=True)(_arrange)
padded_columns: Any = intrinsic(prefer_literal=True)(_padded_columns)
