"""The order of three-bit codes in memory that suits AVX-512: other places for the same bits.

The order of the disk, `planes-le`, keeps two bits of a code apart from the third, and putting them
together costs more than looking the weight up. A look-up reads four bits of a lane, so in the order
`woven` every four bits hold a whole code and one bit to spare, and the spare bits hold the rest.

Each 512 columns of a group, from its first on, are three words A, B, C of 16 lanes, 192 bytes.
Nibble `s` of the words in lane `l` stands for four columns:

- A: column ``64 s + l``, in bits 1 to 3; bit 0 is spare;
- B: column ``64 s + 16 + l``, in bits 0, 2 and 3; bit 1 is spare;
- C: column ``64 s + 32 + l``, in bits 0, 1 and 3; bit 2 is spare;
- ``A ^ B ^ C``: column ``64 s + 48 + l``, in bits 0 to 2.

The columns that are left, fewer than 512, follow in the order of the disk. A group has the same
number of bytes in both orders. Widths other than 3 bits keep the order of the disk.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sketchconv.kernels.jit import inner, jit
from sketchconv.kernels.planes import packed_size
from sketchconv.kernels.pointers import carray, pointer_to
from sketchconv.kernels.threads import for_spans

BITS, LANES, NIBBLES = 3, 16, 8
BLOCK_COLUMNS, BLOCK_BYTES = 512, 192


def differs(bits: int, group_columns: int) -> bool:
    """Whether a group of `group_columns` codes has another order than on disk."""
    return bits == BITS and group_columns >= BLOCK_COLUMNS


@inner
def weave_block(codes: Any, words: Any) -> None:
    """Put 512 codes, one a byte, into uint32 ``[48]``."""
    words[:] = 0
    for nibble in range(NIBBLES):
        shift = np.uint32(4 * nibble)
        for lane in range(LANES):
            at = 4 * LANES * nibble + lane
            a, b = np.uint32(codes[at]), np.uint32(codes[at + LANES])
            c, d = np.uint32(codes[at + 2 * LANES]), np.uint32(codes[at + 3 * LANES])
            a <<= np.uint32(1)
            b = (b & np.uint32(1)) | (b & np.uint32(6)) << np.uint32(1)
            c = (c & np.uint32(3)) | (c & np.uint32(4)) << np.uint32(1)
            rest = a ^ b ^ c ^ d  # the spare bits are 0 so far
            words[lane] |= (a | (rest & np.uint32(1))) << shift
            words[lane + LANES] |= (b | (rest & np.uint32(2))) << shift
            words[lane + 2 * LANES] |= (c | (rest & np.uint32(4))) << shift


@inner
def unweave_block(words: Any, codes: Any) -> None:
    """The inverse of `weave_block`."""
    for nibble in range(NIBBLES):
        shift = np.uint32(4 * nibble)
        for lane in range(LANES):
            at = 4 * LANES * nibble + lane
            a, b = words[lane] >> shift, words[lane + LANES] >> shift
            c = words[lane + 2 * LANES] >> shift
            codes[at] = np.uint8((a >> np.uint32(1)) & np.uint32(7))
            high = (b >> np.uint32(1)) & np.uint32(6)
            codes[at + LANES] = np.uint8((b & np.uint32(1)) | high)
            high = (c >> np.uint32(1)) & np.uint32(4)
            codes[at + 2 * LANES] = np.uint8((c & np.uint32(3)) | high)
            codes[at + 3 * LANES] = np.uint8((a ^ b ^ c) & np.uint32(7))


@inner
def _split(twos: Any, ones: Any, codes: Any) -> None:
    """Codes out of their bytes in the two planes, by whole words: `_join` is 3 times as fast so."""
    fours, eights = codes.view(np.uint32), codes.view(np.uint64)
    for i in range(fours.size):
        word = np.uint32(twos[i])
        word |= word << np.uint32(6)
        word |= word << np.uint32(12)
        fours[i] = word & np.uint32(0x03030303)
    for i in range(eights.size):
        # Byte n of the product keeps bit n only; what it takes to carry into its highest bit.
        bits = np.uint64(ones[i]) * np.uint64(0x0101010101010101)
        bits = (bits & np.uint64(0x8040201008040201)) + np.uint64(0x7F7F7F7F7F7F7F7F)
        eights[i] |= (bits >> np.uint64(5)) & np.uint64(0x0404040404040404)


@inner
def _join(codes: Any, twos: Any, ones: Any) -> None:
    """The inverse of `_split`."""
    fours, eights = codes.view(np.uint32), codes.view(np.uint64)
    for i in range(fours.size):
        word = fours[i] & np.uint32(0x03030303)
        word |= word >> np.uint32(6)
        word |= word >> np.uint32(12)
        twos[i] = np.uint8(word & np.uint32(0xFF))
    for i in range(eights.size):
        bits = (eights[i] >> np.uint64(2)) & np.uint64(0x0101010101010101)
        ones[i] = np.uint8((bits * np.uint64(0x0102040810204080)) >> np.uint64(56))


@inner
def _bytes(address: int, size: int) -> Any:
    return carray(pointer_to(address, np.uint8), (size,))


@inner
def _copy(source: int, target: int, size: int) -> None:
    _bytes(target, size)[:] = _bytes(source, size)


@jit
def _turn(begin: int, end: int, source: int, target: int, columns: int, back: bool) -> None:
    """Groups `begin` to `end` from the order of the disk into the woven one, or `back`."""
    low, high = (columns + 3) // 4, (columns + 7) // 8  # bytes of the two planes
    blocks = columns // BLOCK_COLUMNS
    low_part, high_part = BLOCK_COLUMNS // 4, BLOCK_COLUMNS // 8
    low_rest, high_rest = low - blocks * low_part, high - blocks * high_part
    codes = np.empty(BLOCK_COLUMNS, np.uint8)
    for group in range(begin, end):
        planes = (target if back else source) + group * (low + high)
        woven = (source if back else target) + group * (low + high)
        for block in range(blocks):
            twos = _bytes(planes + block * low_part, low_part)
            ones = _bytes(planes + low + block * high_part, high_part)
            words = carray(pointer_to(woven + block * BLOCK_BYTES, np.uint32), (3 * LANES,))
            if back:
                unweave_block(words, codes)
                _join(codes, twos, ones)
            else:
                _split(twos, ones, codes)
                weave_block(codes, words)
        here, there = planes + blocks * low_part, woven + blocks * BLOCK_BYTES
        further, onward = planes + low + blocks * high_part, there + low_rest
        if back:
            _copy(there, here, low_rest)
            _copy(onward, further, high_rest)
        else:
            _copy(here, there, low_rest)
            _copy(further, onward, high_rest)


def weave(index: Tensor, bits: int, group_columns: int, *, threads: int | None = None) -> Tensor:
    """`index`, uint8 ``[rows, groups, bytes]`` in CPU memory, in the woven order.

    The tensor itself where the order is that of the disk, else a new one of the same shape.

    Args:
        index: rows in the order of the disk.
        bits: bits of a code.
        group_columns: columns of a group.
        threads: None means every core that the process may use; no result depends on it.

    Raises:
        ValueError: `index` is not what the arguments say.
    """
    return _turned(index, bits, group_columns, False, threads)


def restore(index: Tensor, bits: int, group_columns: int, *, threads: int | None = None) -> Tensor:
    """The order of the disk again: the inverse of `weave`, with the same arguments and errors."""
    return _turned(index, bits, group_columns, True, threads)


def _turned(
    index: Tensor, bits: int, group_columns: int, back: bool, threads: int | None
) -> Tensor:
    if not differs(bits, group_columns):
        return index
    size = packed_size(group_columns, bits)
    if index.dtype is not torch.uint8 or not index.is_cpu or index.shape[-1] != size:
        raise ValueError(
            f"a group of {group_columns} columns at {bits} bits is uint8 of {size} bytes in CPU "
            f"memory, got {index.dtype} of {index.shape[-1]} on {index.device}"
        )
    source = index.detach().contiguous()
    target = torch.empty_like(source)
    groups = source.numel() // size
    args = (source.data_ptr(), target.data_ptr(), group_columns, back)
    for_spans(lambda b, e: _turn(b, e, *args), groups, groups * group_columns, threads)
    return target
