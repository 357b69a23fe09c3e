"""Indices packed into 32-bit words, as GPTQ and those after it do it."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sketchconv.errors import SourceError
from sketchconv.formats.tensors import U8Array
from sketchconv.importers.base import Checkpoint

Words = npt.NDArray[Any]
WORD_BITS: Final = 32
WIDTHS: Final = (2, 3, 4, 8)
# Bytes of packed rows that are read at a time; a part of a weight needs all rows of its columns.
_PIECE: Final = 16 << 20


def unpack_words(words: Words, bits: int) -> U8Array:
    """Fields of consecutive bits, from the lowest bit of the first word up.

    Args:
        words: 32-bit ``[rows, n]``; the fields run along the last axis and may straddle words (at 3
            bits, 32 fields take 3 words).
        bits: 2, 3, 4 or 8.

    Returns:
        uint8 ``[rows, n * 32 / bits]``.
    """
    if WORD_BITS % bits:
        return _straddling(np.ascontiguousarray(words).view(np.uint32), bits)
    # A little-endian word is its fields' bytes in order, and no field straddles two bytes.
    packed = np.ascontiguousarray(words).view(np.uint8)
    count = 8 // bits
    out = np.empty((len(packed), packed.shape[1] * count), np.uint8)
    for number in range(count):
        out[:, number::count] = packed >> np.uint8(number * bits) & np.uint8((1 << bits) - 1)
    return out


def _straddling(words: npt.NDArray[np.uint32], bits: int) -> U8Array:
    """Fields of a width that does not divide a word: `bits` words hold 32 of them."""
    runs = words.reshape(len(words), -1, bits)
    out = np.empty((*runs.shape[:2], WORD_BITS), np.uint8)
    for number in range(WORD_BITS):
        word, shift = divmod(number * bits, WORD_BITS)
        field = runs[:, :, word] >> np.uint32(shift)
        if shift + bits > WORD_BITS:
            field = field | (runs[:, :, word + 1] << np.uint32(WORD_BITS - shift))
        out[:, :, number] = field & np.uint32((1 << bits) - 1)
    return out.reshape(len(words), -1)


def packed_rows(bits: int, fields: int, where: str) -> int:
    """Words that hold so many fields.

    Raises:
        SourceError: they do not fill whole words, or the width is unknown.
    """
    if bits not in WIDTHS:
        raise SourceError(f"{where}: {bits} bits; indices of {WIDTHS} bits are known")
    if fields * bits % WORD_BITS or (WORD_BITS % bits and fields % WORD_BITS):
        raise SourceError(f"{where}: {fields} indices of {bits} bits do not fill 32-bit words")
    return fields * bits // WORD_BITS


def indices_of_columns(
    checkpoint: Checkpoint, name: str, bits: int, begin: int, end: int
) -> U8Array:
    """Indices uint8 ``[end - begin, in]`` of columns [begin, end) of words ``[words, out]``."""
    height, width = checkpoint.store.infos[name].shape
    turned = np.empty((end - begin, height), "<i4")
    step = max(1, _PIECE // (4 * width))
    for at in range(0, height, step):
        last = min(at + step, height)
        # Words are turned rather than fields, of which there are several in each.
        turned[:, at:last] = checkpoint.rows(name, at, last)[:, begin:end].T
    return unpack_words(turned, bits)
