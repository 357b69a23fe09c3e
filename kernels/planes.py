"""Bit planes: the `planes-le` packing of index rows, 1 to 8 bits.

An index of `bits` bits is split into fields of 8, 4, 2 and 1 bits, the widest field holding the
lowest bits; each field of a group is one plane, lowest column in the lowest bits of the lowest
byte, padded with zero bits to a whole byte. Specification: `spec/sktch.md`, section packing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sketchconv.kernels.jit import inner, jit
from sketchconv.kernels.threads import for_spans

U8 = NDArray[np.uint8]


def fields(bits: int) -> tuple[int, ...]:
    """Widths of the planes of an index, in stored order: ``fields(7) == (4, 2, 1)``."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits}, must be 1 to 8")
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def packed_size(count: int, bits: int) -> int:
    """Bytes of one group of `count` packed indices."""
    return sum(-(-count * width // 8) for width in fields(bits))


@jit
def _pack_span(codes: Any, packed: Any, begin: int, end: int, bits: int) -> None:
    groups = packed.shape[1]
    count = codes.shape[1] // groups
    for row in range(begin, end):
        for group in range(groups):
            source = codes[row, group * count : (group + 1) * count]
            target = packed[row, group]
            shift = np.uint8(0)
            base = 0
            for width in (8, 4, 2, 1):
                if bits & width:
                    size = (count * width + 7) // 8
                    _pack_plane(source, target[base : base + size], width, shift)
                    base += size
                    shift = np.uint8(shift + width)


@inner
def _pack_plane(source: Any, target: Any, width: int, shift: Any) -> None:
    per_byte = 8 // width
    mask = np.uint8((1 << width) - 1)
    whole = source.size // per_byte
    for byte in range(whole):
        value = np.uint8(0)
        part = source[byte * per_byte : (byte + 1) * per_byte]
        for slot in range(per_byte):
            value |= np.uint8(((part[slot] >> shift) & mask) << np.uint8(slot * width))
        target[byte] = value
    if whole < target.size:
        value = np.uint8(0)
        part = source[whole * per_byte :]
        for slot in range(part.size):
            value |= np.uint8(((part[slot] >> shift) & mask) << np.uint8(slot * width))
        target[whole] = value


def pack_rows(indices: U8, bits: int, groups: int, *, threads: int | None = None) -> U8:
    """Pack index rows.

    Args:
        indices: uint8 ``[rows, columns]``, each below ``2**bits``.
        bits: 1 to 8.
        groups: groups per row; must divide the columns.
        threads: None means every core that the process may use; no result depends on it.

    Returns:
        uint8 ``[rows, groups, packed_size(columns // groups, bits)]``.

    Raises:
        ValueError: `bits` or `threads` out of range, groups that do not divide, or an index of
            too many bits.
    """
    rows, columns = indices.shape
    if groups < 1 or columns % groups:
        raise ValueError(f"{groups} groups do not divide {columns} columns")
    if indices.size and int(indices.max()) >> bits:
        raise ValueError(f"index {int(indices.max())} does not fit {bits} bits")
    packed = np.empty((rows, groups, packed_size(columns // groups, bits)), np.uint8)
    codes = np.ascontiguousarray(indices)
    for_spans(lambda b, e: _pack_span(codes, packed, b, e, bits), rows, codes.size, threads)
    return packed
