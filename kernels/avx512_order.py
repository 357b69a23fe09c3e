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
from sketchconv.kernels.avx512_ir import I64, LANES, VF32, VI32, pointer


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


def _reorder_block(b: Any, block: Block, address: Any) -> None:
    kinds = [pointer(b, b.add(address, I64(64 * i)), VF32) for i in range(block.columns // LANES)]
    vectors = [b.load(kind, align=4) for kind in kinds]
    for vector, kind in zip(reorder(b, vectors, block.order), kinds, strict=True):
        b.store(vector, kind, align=4)


def _arrange(typing: Any, bits: Any, lut: Any, vbmi: Any, x: Any, count: Any, columns: Any) -> Any:
    """Bring `count` groups of activations into the blocks' order, where they are.

    They are float32 at the address `x`, `columns` in each group and zeros up to `padded_columns`.
    """
    plan = blocks(bits.literal_value, lut.literal_value, bool(vbmi.literal_value))

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        b = builder
        first, groups, width = args[3:]
        room = b.mul(padded(b, plan, width), I64(4))
        with cgutils.for_range(b, groups) as group:
            at = b.add(first, b.mul(group.index, room))
            end = b.add(at, room)
            for block in plan:
                size = I64(4 * block.columns)
                full = b.udiv(b.sub(end, at), size)
                if block is not plan[-1]:
                    full = b.udiv(width, I64(block.columns))
                with cgutils.for_range(b, full) as loop:
                    _reorder_block(b, block, b.add(at, b.mul(loop.index, size)))
                at = b.add(at, b.mul(full, size))
        return context.get_dummy_value()

    return types.void(bits, lut, vbmi, *[types.int64] * 3), codegen


def _padded_columns(typing: Any, bits: Any, lut: Any, vbmi: Any, columns: Any) -> Any:
    """Columns of a group, with those that fill its last block."""
    plan = blocks(bits.literal_value, lut.literal_value, bool(vbmi.literal_value))

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return padded(builder, plan, args[3])

    return types.int64(bits, lut, vbmi, types.int64), codegen


arrange: Any = intrinsic(prefer_literal=True)(_arrange)
padded_columns: Any = intrinsic(prefer_literal=True)(_padded_columns)
