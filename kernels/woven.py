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

Each 64 of the columns that are left are the same with one nibble a lane: A, B and C of 8 bytes
each, 24 bytes. Lane `l` has nibble ``l // 2`` of their first four bytes for even `l`, of the last
four for odd `l`: eight bytes in every 64-bit lane of a register need one shift, by lanes.

What is left then, fewer than 64 columns, follows in the order of the disk. A group has the same
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
SHORT_COLUMNS, SHORT_BYTES = 64, 24


def differs(bits: int, group_columns: int) -> bool:
    """Whether a group of `group_columns` codes has another order than on disk."""
    return bits == BITS and group_columns >= BLOCK_COLUMNS


@inner
def _weave(codes: Any, at: int) -> Any:
    """Nibbles of A, B and C that hold the codes at `at` and 16, 32 and 48 further on."""
    a, b = np.uint32(codes[at]), np.uint32(codes[at + LANES])
    c, d = np.uint32(codes[at + 2 * LANES]), np.uint32(codes[at + 3 * LANES])
    a <<= np.uint32(1)
    b = (b & np.uint32(1)) | (b & np.uint32(6)) << np.uint32(1)
    c = (c & np.uint32(3)) | (c & np.uint32(4)) << np.uint32(1)
    rest = a ^ b ^ c ^ d  # the spare bits are 0 so far
    return a | (rest & np.uint32(1)), b | (rest & np.uint32(2)), c | (rest & np.uint32(4))


@inner
def _unweave(a: Any, b: Any, c: Any, codes: Any, at: int) -> None:
    """The inverse of `_weave`; above its nibble a word may hold anything."""
    codes[at] = np.uint8((a >> np.uint32(1)) & np.uint32(7))
    codes[at + LANES] = np.uint8((b & np.uint32(1)) | ((b >> np.uint32(1)) & np.uint32(6)))
    codes[at + 2 * LANES] = np.uint8((c & np.uint32(3)) | ((c >> np.uint32(1)) & np.uint32(4)))
    codes[at + 3 * LANES] = np.uint8((a ^ b ^ c) & np.uint32(7))


@inner
def weave_block(codes: Any, words: Any) -> None:
    """Put 512 codes, one a byte, into uint32 ``[48]``."""
    words[:] = 0
    for nibble in range(NIBBLES):
        shift = np.uint32(4 * nibble)
        for lane in range(LANES):
            a, b, c = _weave(codes, 4 * LANES * nibble + lane)
            words[lane] |= a << shift
            words[lane + LANES] |= b << shift
            words[lane + 2 * LANES] |= c << shift


@inner
def unweave_block(words: Any, codes: Any) -> None:
    """The inverse of `weave_block`."""
    for nibble in range(NIBBLES):
        shift = np.uint32(4 * nibble)
        for lane in range(LANES):
            a, b = words[lane] >> shift, words[lane + LANES] >> shift
            _unweave(a, b, words[lane + 2 * LANES] >> shift, codes, 4 * LANES * nibble + lane)


@inner
def weave_short(codes: Any, words: Any) -> None:
    """Put 64 codes, one a byte, into uint32 ``[6]``."""
    words[:] = 0
    for lane in range(LANES):
        side, shift = lane % 2, np.uint32(4 * (lane // 2))
        a, b, c = _weave(codes, lane)
        words[side] |= a << shift
        words[side + 2] |= b << shift
        words[side + 4] |= c << shift


@inner
def unweave_short(words: Any, codes: Any) -> None:
    """The inverse of `weave_short`."""
    for lane in range(LANES):
        side, shift = lane % 2, np.uint32(4 * (lane // 2))
        a, b = words[side] >> shift, words[side + 2] >> shift
        _unweave(a, b, words[side + 4] >> shift, codes, lane)


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


@inner
def _turn_codes(
    low: int, high: int, woven: int, codes: Any, blocks: int, short: bool, back: bool
) -> None:
    """`blocks` blocks, of 64 columns each where they are `short`, of 512 else.

    `low` and `high` are the addresses of their two planes, `woven` that of their words.
    """
    columns = SHORT_COLUMNS if short else BLOCK_COLUMNS
    part = codes[:columns]
    for block in range(blocks):
        done = block * columns
        twos = _bytes(low + done // 4, columns // 4)
        ones = _bytes(high + done // 8, columns // 8)
        words = carray(pointer_to(woven + done // 8 * 3, np.uint32), (columns // 32 * 3,))
        if back:
            if short:
                unweave_short(words, part)
            else:
                unweave_block(words, part)
            _join(part, twos, ones)
        else:
            _split(twos, ones, part)
            if short:
                weave_short(part, words)
            else:
                weave_block(part, words)


@jit
def _turn(begin: int, end: int, source: int, target: int, columns: int, back: bool) -> None:
    """Groups `begin` to `end` from the order of the disk into the woven one, or `back`."""
    low, high = (columns + 3) // 4, (columns + 7) // 8  # bytes of the two planes
    blocks = columns // BLOCK_COLUMNS
    long = blocks * BLOCK_COLUMNS
    shorts = (columns - long) // SHORT_COLUMNS
    done = long + shorts * SHORT_COLUMNS
    codes = np.empty(BLOCK_COLUMNS, np.uint8)
    for group in range(begin, end):
        twos = (target if back else source) + group * (low + high)
        woven = (source if back else target) + group * (low + high)
        ones = twos + low
        _turn_codes(twos, ones, woven, codes, blocks, False, back)
        _turn_codes(
            twos + long // 4, ones + long // 8, woven + long // 8 * 3, codes, shorts, True, back
        )
        here, there = twos + done // 4, woven + done // 8 * 3
        further, onward = ones + done // 8, there + low - done // 4
        if back:
            _copy(there, here, low - done // 4)
            _copy(onward, further, high - done // 8)
        else:
            _copy(here, there, low - done // 4)
            _copy(further, onward, high - done // 8)


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
