"""Sums of a dense row by the codes of a sketched row, straight from the packed index."""

from __future__ import annotations

from typing import Any

import numpy as np

from sketchconv.kernels.jit import inner, jit
from sketchconv.kernels.pointers import carray, pointer_to
from sketchconv.kernels.woven import (
    BLOCK_BYTES,
    BLOCK_COLUMNS,
    SHORT_BYTES,
    SHORT_COLUMNS,
    unweave_block,
    unweave_short,
)

MOST_LANES, FEWEST_LANES = 16, 4


@inner
def _unpack_plane(plane: Any, width: int, codes: Any, shift: Any) -> None:
    """Add a plane of `width` bits, shifted left, to `codes`; writes to the end of the last byte."""
    if width == 8:
        for i in range(plane.size):
            codes[i] |= plane[i]
    elif width == 4:
        for i in range(plane.size):
            codes[2 * i] |= np.uint8((plane[i] & 15) << shift)
            codes[2 * i + 1] |= np.uint8((plane[i] >> 4) << shift)
    elif width == 2:
        for i in range(plane.size):
            for slot in range(4):
                codes[4 * i + slot] |= np.uint8(((plane[i] >> (2 * slot)) & 3) << shift)
    else:
        for i in range(plane.size):
            for slot in range(8):
                codes[8 * i + slot] |= np.uint8(((plane[i] >> slot) & 1) << shift)


@inner
def _unpack_group(bits: int, index: int, codes: Any, columns: int, woven: int) -> None:
    """Codes of the group at the address `index`; `codes` has 8 to spare."""
    codes[:] = 0
    base, shift, done = 0, 0, 0
    if woven:
        while done + BLOCK_COLUMNS <= columns:
            words = carray(pointer_to(index + base, np.uint32), (BLOCK_BYTES // 4,))
            unweave_block(words, codes[done : done + BLOCK_COLUMNS])
            base += BLOCK_BYTES
            done += BLOCK_COLUMNS
        while done + SHORT_COLUMNS <= columns:
            words = carray(pointer_to(index + base, np.uint32), (SHORT_BYTES // 4,))
            unweave_short(words, codes[done : done + SHORT_COLUMNS])
            base += SHORT_BYTES
            done += SHORT_COLUMNS
    for width in (8, 4, 2, 1):
        if bits & width:
            size = ((columns - done) * width + 7) // 8
            plane = carray(pointer_to(index + base, np.uint8), (size,))
            _unpack_plane(plane, width, codes[done:], shift)
            base += size
            shift += width


@inner
def _load(values: int, rest: int, first: int, row: Any, low: Any) -> None:
    """Columns from element `first` on: float32, or, with `rest`, the sum of two bfloat16."""
    if not rest:
        row[:] = carray(pointer_to(values + 4 * first, np.float32), row.shape)
        return
    high_half = carray(pointer_to(values + 2 * first, np.uint16), row.shape)
    low_half = carray(pointer_to(rest + 2 * first, np.uint16), row.shape)
    high_bits, low_bits = row.view(np.uint32), low.view(np.uint32)
    for i in range(row.size):
        high_bits[i] = np.uint32(high_half[i]) << np.uint32(16)
        low_bits[i] = np.uint32(low_half[i]) << np.uint32(16)
    for i in range(row.size):  # what is left of an infinity is not a number
        row[i] += low[i] if low[i] == low[i] else np.float32(0)


@inner
def _add(row: Any, codes: Any, buckets: Any, lanes: int, bits: int) -> None:
    """Add each column to its bucket in the lane ``column % lanes``."""
    mask, shift = np.uint64(lanes - 1), np.uint64(bits)  # unsigned: no look at negative places
    for i in range(row.size):
        column = np.uint64(i)
        buckets[((column & mask) << shift) | np.uint64(codes[column])] += row[column]


@jit
def bucket_sums(
    begin: int,
    end: int,
    bits: int,
    index: int,
    ids: int,
    values: int,
    rest: int,
    out: int,
    groups: int,
    columns: int,
    woven: int,
) -> None:
    """`out[r, g, k] = sum of values[r, c] over the columns c of group g whose code is k`.

    Sums are float32, in an order that depends on `bits` alone: column i of a group adds to lane
    ``i % lanes``, each with buckets of its own. One set of buckets would make every addition wait
    for the store of the one before wherever two neighbours have one code.

    Args:
        begin: first row.
        end: behind the last row.
        bits: 1 to 8.
        index: address of uint8 ``[*, groups, bytes]``.
        ids: address of the int64 rows of `index` that rows 0, 1, ... stand for; 0: themselves.
        values: address of float32 ``[rows, groups * columns]``; bfloat16 where `rest` is not 0.
        rest: address of bfloat16 of the same shape to add to `values`, or 0.
        out: address of float32 ``[rows, groups, 2**bits]``.
        groups: groups of a row.
        columns: columns of a group.
        woven: 1 where `index` has the order `woven`, 0 for that of the disk.
    """
    size = 0
    for width in (8, 4, 2, 1):
        size += (columns * (bits & width) + 7) // 8
    lanes = min(MOST_LANES, max(FEWEST_LANES, 256 >> bits))
    entries = 1 << bits
    buckets = np.empty(lanes << bits, np.float32)
    codes = np.empty(columns + 8, np.uint8)
    row, low = np.empty(columns, np.float32), np.empty(columns, np.float32)
    for number in range(begin, end):
        source = carray(pointer_to(ids, np.int64), (end,))[number] if ids else number
        for group in range(groups):
            _unpack_group(bits, index + (source * groups + group) * size, codes, columns, woven)
            _load(values, rest, (number * groups + group) * columns, row, low)
            buckets[:] = 0
            _add(row, codes, buckets, lanes, bits)
            place = out + ((number * groups + group) << bits) * 4
            total = carray(pointer_to(place, np.float32), (entries,))
            total[:] = buckets[:entries]
            for lane in range(1, lanes):
                for code in range(entries):
                    total[code] += buckets[(lane << bits) | code]
