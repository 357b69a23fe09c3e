"""Numba kernels around the AVX2 intrinsic: rows times activations."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from sketchconv.kernels import gemv_portable
from sketchconv.kernels.avx2 import row_dots
from sketchconv.kernels.avx2_blocks import COLUMNS, order
from sketchconv.kernels.entries import round_bf16
from sketchconv.kernels.jit import inner, jit
from sketchconv.kernels.planes import fields
from sketchconv.kernels.pointers import carray, pointer_to

TILE_ROWS = 16  # rows that pass by two activations while these stay in the first cache
decode_kernel = gemv_portable.decode_kernel


@inner
def _arranged(places: Any, x: int, half: int, tokens: int, groups: int, columns: int) -> Any:
    """Activations as float32 in the order `places` of the blocks.

    Each group is padded with zeros to whole blocks.
    """
    blocks = (columns + COLUMNS - 1) // COLUMNS
    target = np.zeros(tokens * groups * blocks * COLUMNS, np.float32)
    words = target.view(np.uint32)
    raw32 = carray(pointer_to(x, np.uint32), (tokens * groups * columns,))
    raw16 = carray(pointer_to(x, np.uint16), (tokens * groups * columns,))
    for number in range(tokens * groups * blocks):
        first = number % blocks * COLUMNS
        source = number // blocks * columns + first
        for at in range(COLUMNS):
            column = places[at]
            if first + column < columns:
                if half:
                    word = np.uint32(raw16[source + column]) << np.uint32(16)
                else:
                    word = raw32[source + column]
                words[number * COLUMNS + at] = word
    return target


@inner
def _put(y: int, at: int, value: Any, half: int) -> None:
    if half:
        carray(pointer_to(y + 2 * at, np.uint16), (1,))[0] = round_bf16(value)
    else:
        carray(pointer_to(y + 4 * at, np.float32), (1,))[0] = value


@cache
def multiply_kernel(bits: int, lut: str) -> Any:
    """Kernel of `y = x @ W.T`; its arguments are listed at `dispatch.Multiply`."""
    places = np.array(order(bits), np.int64)
    lut_bytes = 2**bits * (4 if lut == "F32" else 2)
    widths = fields(bits)

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
        activations = _arranged(places, x, half, tokens, groups, columns)
        row_bytes = 0
        for width in widths:
            row_bytes += groups * ((columns * width + 7) // 8)
        stride = 4 * (activations.size // tokens)
        for tile in range(begin, end, TILE_ROWS):
            for token in range(0, tokens, 2):
                # The address is taken here, in the loops: Numba frees an array after its last use.
                at = np.int64(activations.ctypes.data) + token * stride
                for row in range(tile, min(tile + TILE_ROWS, end)):
                    codes = index + row * row_bytes
                    luts = tables + row * groups * lut_bytes
                    to = token * rows + row
                    if token + 1 < tokens:
                        two = row_dots(bits, lut, 2, codes, luts, at, stride, groups, columns)
                        _put(y, to, two[0], half)
                        _put(y, to + rows, two[1], half)
                    else:
                        one = row_dots(bits, lut, 1, codes, luts, at, stride, groups, columns)
                        _put(y, to, one[0], half)

    return multiply
