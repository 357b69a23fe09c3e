"""Codes out of packed words, inside a kernel.

`repacked` below is a constant of compilation: whether the group is in the device order of
`sketchconv.kernels.gpu.layout` (3 bits, groups of a multiple of 32 columns) instead of planes.
"""

from __future__ import annotations

import triton.language as tl

from sketchconv.kernels.gpu.jit import jit


@jit
def codes(
    start: tl.tensor,
    column: tl.tensor,
    mask: tl.tensor,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    REPACKED: tl.constexpr,
) -> tl.tensor:
    """Codes, int32, at `column` of the groups whose first bytes are at `start`.

    Args:
        start: uint8 pointers, of a shape that broadcasts with `column`: add the 64-bit offset of
            the row and group before, so that what is added here fits 32 bits.
        column: int32 columns within the group.
        mask: of the broadcast shape (or one that broadcasts): where to load at all; elsewhere 0.
        GROUP: columns of a group.
        BITS: 1 to 8.
        REPACKED: order of the bytes, see the module.
    """
    return (
        _repacked(start, column, mask, GROUP)
        if REPACKED
        else _planes(start, column, mask, GROUP, BITS)
    )


@jit
def _planes(
    start: tl.tensor, column: tl.tensor, mask: tl.tensor, GROUP: tl.constexpr, BITS: tl.constexpr
) -> tl.tensor:
    # One byte load per plane: neighbours that share a byte share the cache line. The planes are
    # written out: constants computed in a loop are not constants to the compiler.
    B8: tl.constexpr = GROUP if BITS & 8 else 0
    B4: tl.constexpr = B8 + ((GROUP + 1) // 2 if BITS & 4 else 0)
    B2: tl.constexpr = B4 + ((GROUP + 3) // 4 if BITS & 2 else 0)
    if BITS & 8:
        code = tl.load(start + column, mask=mask, other=0).to(tl.int32)
    else:
        code = _field(start, column, mask, 0, 4, BITS)
        code |= _field(start + B4, column, mask, BITS & 4, 2, BITS)
        code |= _field(start + B2, column, mask, BITS & 6, 1, BITS)
    return code


@jit
def _field(
    start: tl.tensor,
    column: tl.tensor,
    mask: tl.tensor,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
) -> tl.tensor:
    """Bits FIRST and up of the codes: one plane of WIDTH bits, or zero if there is none."""
    if BITS & WIDTH:
        per_byte: tl.constexpr = 8 // WIDTH
        byte = tl.load(start + column // per_byte, mask=mask, other=0).to(tl.int32)
        field = ((byte >> (column % per_byte * WIDTH)) & ((1 << WIDTH) - 1)) << FIRST
    else:
        field = 0
    return field


@jit
def _repacked(
    start: tl.tensor, column: tl.tensor, mask: tl.tensor, GROUP: tl.constexpr
) -> tl.tensor:
    # Columns 0 to 23 of a block of 32 are the low three bits of the 24 nibbles of its three words,
    # columns 24 to 31 are in their fourth bits. Word p of every block is in the p-th third.
    WORD: tl.constexpr = GROUP // 8
    slot = column % 32
    shift = slot % 2 * 4
    own = start + (column // 32 * 4 + slot % 8 // 2)
    last = slot >= 24
    word = tl.where(last, 0, slot // 8) * WORD
    first = tl.load(own + word, mask=mask, other=0).to(tl.int32) >> shift
    # Only the last eight need the bytes of the other two words.
    second = tl.load(own + WORD, mask=mask & last, other=0).to(tl.int32) >> shift
    third = tl.load(own + 2 * WORD, mask=mask & last, other=0).to(tl.int32) >> shift
    spread = (first >> 3 & 1) | (second >> 2 & 2) | (third >> 1 & 4)
    return tl.where(last, spread, first & 7)
