"""Which blocks a row is read in, by bits, LUT, CPU and the order of its codes."""

from __future__ import annotations

from functools import cache

from sketchconv.kernels.avx512_blocks import (
    Block,
    nibble_block,
    rereading_block,
    window_block,
    word_block,
)
from sketchconv.kernels.avx512_bytes import byte_block
from sketchconv.kernels.avx512_woven import READERS, woven_block
from sketchconv.kernels.orders import WOVEN

# Rows at once for one activation, each a stream of its own. More would not stay in registers.
BANDS = {2: 4, 3: 4, 4: 4}
WOVEN_BANDS = 2  # 4 spill: 30 % slower


def way_of(bits: int, lut: str, vbmi: bool, order: str) -> str:
    """How codes are read: in the order "woven", or with "vbmi" where it helps, else "plain"."""
    if order == WOVEN:
        return WOVEN
    return "vbmi" if vbmi and (bits == 3 or (bits >= 6 and lut != "F32")) else "plain"


def by_bytes(bits: int, way: str) -> bool:
    """Whether LUTs are looked up as low and high bytes."""
    return way == "vbmi" and bits >= 6


def bands(bits: int, way: str) -> int:
    """Rows at once for one activation."""
    return WOVEN_BANDS if way == WOVEN else BANDS.get(bits, 1)


def running_sums(bits: int, way: str) -> int:
    """Running sums of a dot product: 4 keep the multipliers busy.

    Where 4 rows share an activation 2 do, and more would not stay in registers: the order of a
    row's sum must be one and the same.
    """
    return 2 if bands(bits, way) == 4 else 4


@cache
def blocks(bits: int, lut: str, way: str) -> tuple[Block, ...]:
    """The blocks of a group: as many of the first kind as fit, then of the next, and one short."""
    if by_bytes(bits, way):
        return (byte_block(bits, lut),)
    if bits == 3:
        kinds = tuple(map(woven_block, READERS)) if way == WOVEN else (nibble_block(way == "vbmi"),)
        return (*kinds, word_block(bits))
    if bits == 4:
        return (rereading_block(), word_block(bits))
    return (window_block(bits) if bits < 3 else word_block(bits),)
