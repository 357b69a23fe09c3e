"""Activations in the order in which AVX-512 blocks yield their weights (`avx512_blocks.py`).

A block of activations stays in registers: it is brought into order by rounds of two-register
shuffles, 0.1 ns per activation, where a loop over single elements takes 2 ns.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sketchconv.kernels.avx512_blocks import Block, blocks
from sketchconv.kernels.avx512_ir import (
    I32,
    I64,
    LANES,
    VF32,
    VI32,
    call,
    load,
    pointer,
    splat,
)


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


def _load_x(b: Any, address: Any, half: bool, left: Any | None) -> Any:
    """16 activations as float32; beyond the first `left` of them zeros, which are not read."""
    kind = ir.VectorType(ir.IntType(16 if half else 32), LANES)
    if left is None:
        raw = load(b, address, kind)
    else:
        some = b.select(b.icmp_signed(">", left, I64(0)), left, I64(0))
        few = b.select(b.icmp_signed("<", some, I64(LANES)), some, I64(LANES))
        flags = b.sub(b.shl(I64(1), few), I64(1))
        mask = b.bitcast(b.trunc(flags, ir.IntType(LANES)), ir.VectorType(ir.IntType(1), LANES))
        args = [pointer(b, address, kind), I32(1), mask, ir.Constant(kind, None)]
        call_name = f"llvm.masked.load.v16i{16 if half else 32}.p0"
        raw = call(b, call_name, kind, args)
    words = b.shl(b.zext(raw, VI32), splat(16)) if half else raw
    return b.bitcast(words, VF32)


def _block(b: Any, block: Block, half: bool, x: Any, target: Any, left: Any | None) -> None:
    vectors = []
    for first in range(0, block.columns, LANES):
        at = b.add(x, I64(first * (2 if half else 4)))
        vectors.append(_load_x(b, at, half, None if left is None else b.sub(left, I64(first))))
    for number, vector in enumerate(reorder(b, vectors, block.order)):
        b.store(vector, pointer(b, b.add(target, I64(4 * LANES * number)), VF32), align=4)


def _emit_group(
    b: Any, plan: tuple[Block, ...], half: bool, x: Any, target: Any, columns: Any
) -> None:
    """One group of one activation; `target` has room for whole blocks."""
    done = I64(0)
    for block in plan:
        size = I64(block.columns)
        left = b.sub(columns, done)
        full = b.udiv(left, size)

        def put(number: Any, short: Any, block: Block = block, done: Any = done) -> None:
            at = b.add(done, b.mul(number, I64(block.columns)))
            source = b.add(x, b.mul(at, I64(2 if half else 4)))
            _block(b, block, half, source, b.add(target, b.mul(at, I64(4))), short)

        with cgutils.for_range(b, full) as loop:
            put(loop.index, None)
        done = b.add(done, b.mul(full, size))
        if block is plan[-1]:
            tail = b.sub(columns, done)
            with b.if_then(b.icmp_unsigned(">", tail, I64(0))):
                put(full, tail, done=b.sub(done, b.mul(full, size)))


def padded(b: Any, plan: tuple[Block, ...], columns: Any) -> Any:
    """Columns of a group, with those that fill its last block."""
    done = I64(0)
    for block in plan[:-1]:
        full = b.udiv(b.sub(columns, done), I64(block.columns))
        done = b.add(done, b.mul(full, I64(block.columns)))
    size = plan[-1].columns
    count = b.udiv(b.add(b.sub(columns, done), I64(size - 1)), I64(size))
    return b.add(done, b.mul(count, I64(size)))


def _arrange(
    typing: Any,
    bits: Any,
    lut: Any,
    vbmi: Any,
    half: Any,
    x: Any,
    target: Any,
    count: Any,
    columns: Any,
) -> Any:
    """Put `count` groups of `columns` activations, at the address `x`, into the blocks' order.

    `x` holds float32 or (`half`) bfloat16, `target` has room for `padded_columns` float32 a group.
    """
    plan = blocks(bits.literal_value, lut.literal_value, vbmi.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, into, groups, width = args[4:]
        room = builder.mul(padded(builder, plan, width), I64(4))
        step = builder.mul(width, I64(2 if half.literal_value else 4))
        with cgutils.for_range(builder, groups) as group:
            at = builder.add(source, builder.mul(group.index, step))
            to = builder.add(into, builder.mul(group.index, room))
            _emit_group(builder, plan, half.literal_value, at, to, width)
        return context.get_dummy_value()

    return types.void(bits, lut, vbmi, half, *[types.int64] * 4), codegen


def _padded_columns(typing: Any, bits: Any, lut: Any, vbmi: Any, columns: Any) -> Any:
    """Columns of a group, with those that fill its last block."""
    plan = blocks(bits.literal_value, lut.literal_value, vbmi.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return padded(builder, plan, args[3])

    return types.int64(bits, lut, vbmi, types.int64), codegen


arrange: Any = intrinsic(prefer_literal=True)(_arrange)
padded_columns: Any = intrinsic(prefer_literal=True)(_padded_columns)
