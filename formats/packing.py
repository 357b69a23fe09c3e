"""The packing `planes-le`: indices of 1 to 8 bits as power-of-two bit planes, lowest bits first.

A b-bit index is cut into fields of 8, 4, 2 and 1 bits, widest first, from its lowest bits up.
Each field of all columns of a group forms one plane, padded with zero bits to whole bytes.
Section 5 of `spec/sktch.md` (SKT-071 and the worked example) is the norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import numpy as np

from sketchconv.formats.tensors import U8Array

PLANES: Final[Mapping[int, tuple[int, ...]]] = MappingProxyType(
    {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
)
"""The widths of the planes for each number of bits, in stored order."""


def plane_size(count: int, width: int) -> int:
    """Return the bytes of one plane of `count` fields of `width` bits."""
    return -(-count * width // 8)


def packed_size(count: int, bits: int) -> int:
    """Return the bytes of one group of `count` indices of `bits` bits.

    Raises:
        ValueError: if `count` is below 1 or `bits` outside 1..8.
    """
    _check(count, bits)
    return sum(plane_size(count, width) for width in PLANES[bits])


def pack(indices: U8Array, bits: int) -> U8Array:
    """Pack uint8 indices `[..., count]` into uint8 `[..., packed_size(count, bits)]`.

    Raises:
        ValueError: if an index does not fit in `bits`, or the dtype is not uint8.
    """
    if indices.dtype != np.uint8 or indices.ndim < 1:
        raise ValueError(f"indices must be uint8 [..., count], got {indices.dtype} {indices.shape}")
    count = indices.shape[-1]
    _check(count, bits)
    if bits < 8 and indices.size and int(indices.max()) >> bits:
        raise ValueError(f"index {int(indices.max())} does not fit in {bits} bits")
    planes, shift = [], 0
    for width in PLANES[bits]:
        planes.append(_pack_plane(indices, shift, width))
        shift += width
    return np.concatenate(planes, axis=-1) if len(planes) > 1 else planes[0]


def unpack(packed: U8Array, bits: int, count: int, *, strict: bool = False) -> U8Array:
    """Unpack uint8 `[..., packed_size(count, bits)]` into uint8 indices `[..., count]`.

    Args:
        packed: the stored bytes of each group.
        bits: bits per index, 1 to 8.
        count: indices per group.
        strict: refuse padding bits that are not zero (SKT-071).

    Returns:
        A new array, except at 8 bits, where the packed bytes are the indices.

    Raises:
        ValueError: on a wrong size, or with `strict` on non-zero padding bits.
    """
    size = packed_size(count, bits)
    if packed.dtype != np.uint8 or packed.ndim < 1 or packed.shape[-1] != size:
        raise ValueError(f"packed must be uint8 [..., {size}], got {packed.dtype} {packed.shape}")
    if strict and nonzero_padding(packed, bits, count):
        raise ValueError("padding bits of a plane are not zero")
    out, begin, shift = None, 0, 0
    for width in PLANES[bits]:
        end = begin + plane_size(count, width)
        field = _unpack_plane(packed[..., begin:end], width, count)
        out = field if out is None else out | (field << np.uint8(shift))
        begin, shift = end, shift + width
    return np.ascontiguousarray(out)


def nonzero_padding(packed: U8Array, bits: int, count: int) -> int:
    """Return how many planes of uint8 `[..., packed_size]` have padding bits that are not zero."""
    bad, begin = 0, 0
    for width in PLANES[bits]:
        end = begin + plane_size(count, width)
        used = count * width % 8
        if used:
            bad += int(np.count_nonzero(packed[..., end - 1] >> np.uint8(used)))
        begin = end
    return bad


def _check(count: int, bits: int) -> None:
    if bits not in PLANES or count < 1:
        raise ValueError(f"bits must be 1..8 and count at least 1, got {bits} and {count}")


def _pack_plane(indices: U8Array, shift: int, width: int) -> U8Array:
    if width == 8:
        return indices.copy()
    field = (indices >> np.uint8(shift)) & np.uint8((1 << width) - 1)
    if width == 1:
        return np.packbits(field, axis=-1, bitorder="little")
    per = 8 // width
    spare = -field.shape[-1] % per
    if spare:
        field = np.concatenate([field, np.zeros((*field.shape[:-1], spare), np.uint8)], axis=-1)
    # One little-endian word holds the fields of one byte, a byte apart; fold them together.
    word = np.ascontiguousarray(field).view("<u2" if width == 4 else "<u4")
    if width == 4:
        word = word | (word >> np.uint16(4))
    else:
        word = word | (word >> np.uint32(6))
        word = word | (word >> np.uint32(12))
    folded: U8Array = word.astype(np.uint8)
    return folded


def _unpack_plane(plane: U8Array, width: int, count: int) -> U8Array:
    if width == 8:
        return plane
    if width == 1:
        return np.unpackbits(plane, axis=-1, count=count, bitorder="little")
    # The reverse of the folding: spread the fields of one byte over the bytes of one word.
    if width == 4:
        half = plane.astype("<u2")
        fields: U8Array = ((half | (half << np.uint16(4))) & np.uint16(0x0F0F)).view(np.uint8)
    else:
        word = plane.astype("<u4")
        word = (word | (word << np.uint32(12))) & np.uint32(0x000F000F)
        fields = ((word | (word << np.uint32(6))) & np.uint32(0x03030303)).view(np.uint8)
    return fields[..., :count]
