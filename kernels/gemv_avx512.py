"""Numba kernels around the AVX-512 intrinsics: rows times activations, and rows decoded."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from sketchconv.kernels import avx512_plan
from sketchconv.kernels.avx512 import row_dots
from sketchconv.kernels.avx512_bf16 import decode_group_bf16
from sketchconv.kernels.avx512_decode import decode_group
from sketchconv.kernels.avx512_order import arrange, padded_columns
from sketchconv.kernels.entries import round_bf16
from sketchconv.kernels.jit import inner, jit
from sketchconv.kernels.planes import fields
from sketchconv.kernels.pointers import carray, pointer_to

ALIGNMENT = 64
TILE_ROWS = 16  # rows that pass by each group of activations while these stay in the first cache
MANY_BYTES = 1 << 15  # activations that stay there; beyond, 2 at once are faster than 4


@inner
def aligned(size: int) -> Any:
    """Float32 that start at a multiple of 64 bytes."""
    room = np.empty(size + ALIGNMENT // 4, np.float32)
    skip = (-room.ctypes.data % ALIGNMENT) // 4
    return room[skip : skip + size]


@inner
def put(y: int, at: int, value: Any, half: int) -> None:
    """Store a float32 as element `at` of `y`, float32 or (`half`) bfloat16."""
    if half:
        carray(pointer_to(y + 2 * at, np.uint16), (1,))[0] = round_bf16(value)
    else:
        carray(pointer_to(y + 4 * at, np.float32), (1,))[0] = value


@cache
def multiply_kernel(bits: int, lut: str, vbmi: bool, order: str) -> Any:
    """Kernel of `y = x @ W.T`; its arguments are listed at `dispatch.Multiply`."""
    way = avx512_plan.way_of(bits, lut, vbmi, order)
    lut_bytes = 2**bits * (4 if lut == "F32" else 2)
    widths = fields(bits)
    bands = avx512_plan.bands(bits, way)

    @jit
    def multiply(
        begin: int,
        end: int,
        index: int,
        tables: int,
        x: int,
        y: int,
        half: int,
        tokens: int,
        rows: int,
        groups: int,
        columns: int,
    ) -> None:
        if tokens == 0:
            return
        width = padded_columns(bits, lut, way, columns)
        activations = aligned(tokens * groups * width)
        target = np.int64(activations.ctypes.data)
        arrange(bits, lut, way, half, x, target, tokens * groups, columns)
        row_bytes = 0
        for field in widths:
            row_bytes += groups * ((columns * field + 7) // 8)
        stride = 4 * groups * width
        if tokens == 1 and bands > 1:
            apart = (end - begin) // bands
            at = np.int64(activations.ctypes.data)
            for row in range(begin, begin + apart):
                codes = index + row * row_bytes
                luts = tables + row * groups * lut_bytes
                dots = row_dots(
                    bits, lut, way, bands, 1, codes, luts, at, stride, apart, groups, columns
                )
                for band in range(bands):
                    put(y, row + band * apart, dots[band], half)
            begin += bands * apart
        many = 4 if 4 * stride <= MANY_BYTES else 2
        for tile in range(begin, end, TILE_ROWS):
            last = min(tile + TILE_ROWS, end)
            token = 0
            while token < tokens:
                count = many if token + many <= tokens else 2 if token + 2 <= tokens else 1
                # The address is taken here, in the loops: Numba frees an array after its last use.
                at = np.int64(activations.ctypes.data) + token * stride
                for row in range(tile, last):
                    codes = index + row * row_bytes
                    luts = tables + row * groups * lut_bytes
                    to = token * rows + row
                    if count == 1:
                        one = row_dots(
                            bits, lut, way, 1, 1, codes, luts, at, stride, 0, groups, columns
                        )
                        put(y, to, one[0], half)
                    elif count == 2:
                        two = row_dots(
                            bits, lut, way, 1, 2, codes, luts, at, stride, 0, groups, columns
                        )
                        put(y, to, two[0], half)
                        put(y, to + rows, two[1], half)
                    else:
                        four = row_dots(
                            bits, lut, way, 1, 4, codes, luts, at, stride, 0, groups, columns
                        )
                        for part in range(4):
                            put(y, to + part * rows, four[part], half)
                token += count

    return multiply


@cache
def decode_kernel(bits: int, lut: str, out: str, order: str) -> Any:
    """Kernel that writes rows of W as `out` ("F32" or "BF16"); see `dispatch.Decode`."""
    size = 2 if out == "BF16" else 4
    lut_bytes = 2**bits * (4 if lut == "F32" else 2)
    widths = fields(bits)

    @jit
    def decode(
        begin: int,
        end: int,
        index: int,
        tables: int,
        ids: int,
        target: int,
        groups: int,
        columns: int,
    ) -> None:
        group_bytes = 0
        for width in widths:
            group_bytes += (columns * width + 7) // 8
        for number in range(begin, end):
            row = carray(pointer_to(ids, np.int64), (end,))[number] if ids else number
            for group in range(groups):
                source = row * groups + group
                at = target + (number * groups + group) * columns * size
                codes = index + source * group_bytes
                luts = tables + source * lut_bytes
                if out == "BF16":
                    decode_group_bf16(bits, lut, order, codes, luts, at, columns)
                else:
                    decode_group(bits, lut, order, codes, luts, at, columns)

    return decode
