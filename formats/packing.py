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

_BYTES = np.arange(256, dtype=np.uint8)
_FIELDS: Final[Mapping[int, U8Array]] = MappingProxyType(
    {
        width: np.stack(
            [(_BYTES >> shift) & ((1 << width) - 1) for shift in range(0, 8, width)], axis=1
        ).astype(np.uint8)
        for width in (1, 2, 4)
    }
)


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
    if width == 1:
        bit = (indices >> np.uint8(shift)) & np.uint8(1)
        return np.packbits(bit, axis=-1, bitorder="little")
    count, per = indices.shape[-1], 8 // width
    size = plane_size(count, width)
    out = np.zeros((*indices.shape[:-1], size), np.uint8)
    for k in range(min(per, count)):
        field = (indices[..., k::per] >> np.uint8(shift)) & np.uint8((1 << width) - 1)
        out[..., : field.shape[-1]] |= field << np.uint8(k * width)
    return out


def _unpack_plane(plane: U8Array, width: int, count: int) -> U8Array:
    if width == 8:
        return plane
    if width == 1:
        return np.unpackbits(plane, axis=-1, count=count, bitorder="little")
    fields = _FIELDS[width][plane]
    return fields.reshape(*plane.shape[:-1], -1)[..., :count]
