"""The Numba kernel around `avx512_tasks`: rows times activations of several tasks."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from sketchconv.kernels import avx512_plan
from sketchconv.kernels.avx512 import row_dots
from sketchconv.kernels.avx512_order import arrange, padded_columns
from sketchconv.kernels.avx512_tasks import task_dots
from sketchconv.kernels.gemv_avx512 import TILE_ROWS, aligned, put
from sketchconv.kernels.jit import jit
from sketchconv.kernels.planes import fields
from sketchconv.kernels.pointers import carray, pointer_to

BITS = (2, 3, 4)  # with more, the tables of two tasks do not stay in registers


@cache
def multiply_kernel(bits: int, lut: str, vbmi: bool, order: str) -> Any:
    """As `gemv_avx512.multiply_kernel`, but `tables` is the address of a LUT's address per token.

    Results are the same, bit for bit.
    """
    way = avx512_plan.way_of(bits, lut, vbmi, order)
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
        width = padded_columns(bits, lut, way, columns)
        activations = aligned(tokens * groups * width)
        target = np.int64(activations.ctypes.data)
        arrange(bits, lut, way, half, x, target, tokens * groups, columns)
        row_bytes = 0
        for field in widths:
            row_bytes += groups * ((columns * field + 7) // 8)
        stride = 4 * groups * width
        luts = carray(pointer_to(tables, np.int64), (tokens,))
        for tile in range(begin, end, TILE_ROWS):
            last = min(tile + TILE_ROWS, end)
            token = 0
            while token < tokens:
                same = 1
                while same < 4 and token + same < tokens and luts[token + same] == luts[token]:
                    same += 1
                left = tokens - token
                # The address is taken here, in the loops: Numba frees an array after its last use.
                at = np.int64(activations.ctypes.data) + token * stride
                own = tables + 8 * token
                count = 4 if same == 4 else 2 if same >= 2 else 4 if left >= 4 else min(left, 2)
                for row in range(tile, last):
                    codes = index + row * row_bytes
                    skip = row * groups * lut_bytes
                    table = luts[token] + skip
                    to = token * rows + row
                    if count == 1:
                        one = row_dots(
                            bits, lut, way, 1, 1, codes, table, at, stride, 0, groups, columns
                        )
                        put(y, to, one[0], half)
                    elif same == 4:
                        four = row_dots(
                            bits, lut, way, 1, 4, codes, table, at, stride, 0, groups, columns
                        )
                        for part in range(4):
                            put(y, to + part * rows, four[part], half)
                    elif same >= 2:
                        two = row_dots(
                            bits, lut, way, 1, 2, codes, table, at, stride, 0, groups, columns
                        )
                        for part in range(2):
                            put(y, to + part * rows, two[part], half)
                    elif count == 4:
                        four = task_dots(
                            bits, lut, way, 4, codes, own, skip, at, stride, groups, columns
                        )
                        for part in range(4):
                            put(y, to + part * rows, four[part], half)
                    else:
                        two = task_dots(
                            bits, lut, way, 2, codes, own, skip, at, stride, groups, columns
                        )
                        for part in range(2):
                            put(y, to + part * rows, two[part], half)
                token += count

    return multiply
