"""Plain Numba kernels on packed sketches, for every CPU: a row is decoded into a buffer, then used.

All sums run over 8 interleaved lanes in a fixed order. Addresses stand for arrays: `index` for
uint8 ``[rows, groups, bytes]``, `tables` for the LUT's carrier ``[rows, groups, 2**bits]``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from sketchconv.kernels.entries import BF16, F32, KINDS, round_bf16
from sketchconv.kernels.jit import jit
from sketchconv.kernels.pointers import carray, pointer_to

SUM_LANES = 8


@jit
def _half_bits(half: Any) -> Any:
    """Float32 bits of a float16 given by its bits."""
    sign = np.uint32(half & 0x8000) << np.uint32(16)
    magnitude = np.uint32(half & 0x7FFF)
    if magnitude >= 0x7C00:  # infinity or NaN, which becomes quiet as in every CPU's conversion
        quiet = np.uint32(0x00400000) if magnitude > 0x7C00 else np.uint32(0)
        return np.uint32(sign | np.uint32(0x7F800000) | (magnitude << np.uint32(13)) | quiet)
    if magnitude < 0x0400:  # zero or subnormal: a multiple of 2**-24
        value = np.float32(magnitude) * np.float32(2.0**-24)
        return np.uint32(sign | np.float32(value).view(np.uint32))
    return np.uint32(sign | ((magnitude << np.uint32(13)) + np.uint32(112 << 23)))


@jit
def _load_table(kind: int, tables: int, first: int, table: Any) -> None:
    """Convert `table.size` LUT entries from entry `first` on to float32."""
    words = table.view(np.uint32)
    if kind == F32:
        raw32 = carray(pointer_to(tables + 4 * first, np.uint32), (table.size,))
        words[:] = raw32
        return
    raw16 = carray(pointer_to(tables + 2 * first, np.uint16), (table.size,))
    for i in range(table.size):
        words[i] = np.uint32(raw16[i]) << np.uint32(16) if kind == BF16 else _half_bits(raw16[i])


@jit
def _group_codes(bits: int, index: int, codes: Any, columns: int) -> int:
    """Unpack one group at the address `index` into `codes`; returns its bytes."""
    codes[:] = 0
    base = 0
    shift = np.uint8(0)
    for width in (8, 4, 2, 1):
        if bits & width:
            size = (columns * width + 7) // 8
            plane = carray(pointer_to(index + base, np.uint8), (size,))
            mask = np.uint8((1 << width) - 1)
            per_byte = 8 // width
            for i in range(size):
                for slot in range(per_byte):
                    code = (plane[i] >> np.uint8(slot * width)) & mask
                    codes[i * per_byte + slot] |= np.uint8(code << shift)
            base += size
            shift = np.uint8(shift + width)
    return base


@jit
def _decode_row(
    bits: int, kind: int, index: int, tables: int, row: int, groups: int, codes: Any, out: Any
) -> None:
    """Decode one row into float32 `out`; `codes` has room for a group and 8 more."""
    columns = out.size // groups
    table = np.empty(1 << bits, np.float32)
    size = 0
    for width in (8, 4, 2, 1):
        if bits & width:
            size += (columns * width + 7) // 8
    for group in range(groups):
        number = row * groups + group
        _load_table(kind, tables, number << bits, table)
        _group_codes(bits, index + number * size, codes, columns)
        for column in range(columns):
            out[group * columns + column] = table[codes[column]]


@jit
def _load_x(x: int, half: bool, total: int) -> Any:
    """Activations as float32, from float32 or bfloat16."""
    if not half:
        return carray(pointer_to(x, np.float32), (total,)).copy()
    values = np.empty(total, np.float32)
    values.view(np.uint32)[:] = carray(pointer_to(x, np.uint16), (total,))
    words = values.view(np.uint32)
    for i in range(total):
        words[i] <<= np.uint32(16)
    return values


@jit
def _dot(weights: Any, x: Any) -> Any:
    lanes = np.zeros(SUM_LANES, np.float32)
    whole = weights.size // SUM_LANES * SUM_LANES
    for first in range(0, whole, SUM_LANES):
        for lane in range(SUM_LANES):
            lanes[lane] += weights[first + lane] * x[first + lane]
    for column in range(whole, weights.size):
        lanes[column - whole] += weights[column] * x[column]
    total = np.float32(0)
    for lane in range(SUM_LANES):
        total += lanes[lane]
    return total


@jit
def _multiply(
    bits: int,
    kind: int,
    begin: int,
    end: int,
    index: int,
    tables: int,
    x: int,
    y: int,
    half: bool,
    tokens: int,
    rows: int,
    groups: int,
    columns: int,
) -> None:
    values = _load_x(x, half, tokens * groups * columns)
    weights = np.empty(groups * columns, np.float32)
    codes = np.empty(columns + 8, np.uint8)
    full = carray(pointer_to(y, np.float32), (tokens * rows,))
    short = carray(pointer_to(y, np.uint16), (tokens * rows,))
    for row in range(begin, end):
        _decode_row(bits, kind, index, tables, row, groups, codes, weights)
        for token in range(tokens):
            total = _dot(weights, values[token * weights.size : (token + 1) * weights.size])
            if half:
                short[token * rows + row] = round_bf16(total)
            else:
                full[token * rows + row] = total


@jit
def _decode(
    bits: int,
    kind: int,
    half: bool,
    begin: int,
    end: int,
    index: int,
    tables: int,
    ids: int,
    out: int,
    groups: int,
    columns: int,
) -> None:
    weights = np.empty(groups * columns, np.float32)
    codes = np.empty(columns + 8, np.uint8)
    for number in range(begin, end):
        row = carray(pointer_to(ids, np.int64), (end,))[number] if ids else number
        _decode_row(bits, kind, index, tables, row, groups, codes, weights)
        if half:
            short = carray(pointer_to(out + 2 * number * weights.size, np.uint16), weights.shape)
            for column in range(weights.size):
                short[column] = round_bf16(weights[column])
        else:
            carray(pointer_to(out + 4 * number * weights.size, np.float32), weights.shape)[:] = (
                weights
            )


def multiply_kernel(bits: int, lut: str) -> Any:
    """Kernel of `y = x @ W.T`; its arguments are listed at `dispatch.Multiply`."""
    return partial(_multiply, bits, KINDS[lut])


def decode_kernel(bits: int, lut: str, out: str) -> Any:
    """Kernel that writes rows of W as `out` ("F32" or "BF16"); see `dispatch.Decode`."""
    return partial(_decode, bits, KINDS[lut], out == "BF16")
