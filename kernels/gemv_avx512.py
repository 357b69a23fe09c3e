"""Numba kernels around the AVX-512 intrinsics: rows times activations, and rows decoded."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from sketchconv.kernels.avx512 import decode_group, row_dots
from sketchconv.kernels.avx512_ir import LANES, slots
from sketchconv.kernels.entries import round_bf16
from sketchconv.kernels.jit import jit
from sketchconv.kernels.planes import fields
from sketchconv.kernels.pointers import carray, pointer_to

ALIGNMENT = 64


@jit
def _permute(x: int, half: bool, tokens: int, groups: int, columns: int, deep: int) -> Any:
    """Activations as float32 in the order of the lanes, each group padded with zeros to blocks.

    Column `16 * deep * block + deep * lane + slot` of a group goes to
    `16 * deep * block + 16 * slot + lane`. The result starts at a multiple of 64 bytes.
    """
    size = LANES * deep
    blocks = (columns + size - 1) // size
    room = np.zeros(tokens * groups * blocks * size + ALIGNMENT // 4, np.float32)
    skip = (-room.ctypes.data % ALIGNMENT) // 4
    target = room[skip : skip + tokens * groups * blocks * size]
    words = target.view(np.uint32)
    total = tokens * groups * columns
    raw32 = carray(pointer_to(x, np.uint32), (total,))
    raw16 = carray(pointer_to(x, np.uint16), (total,))
    for group in range(tokens * groups):
        for column in range(columns):
            block, inner = divmod(column, size)
            lane, slot = divmod(inner, deep)
            at = (group * blocks + block) * size + slot * LANES + lane
            source = group * columns + column
            words[at] = np.uint32(raw16[source]) << np.uint32(16) if half else raw32[source]
    return target


@jit
def _put(y: int, at: int, value: Any, half: bool) -> None:
    if half:
        carray(pointer_to(y + 2 * at, np.uint16), (1,))[0] = round_bf16(value)
    else:
        carray(pointer_to(y + 4 * at, np.float32), (1,))[0] = value


@cache
def multiply_kernel(bits: int, lut: str) -> Any:
    """Kernel of `y = x @ W.T`; its arguments are listed at `dispatch.Multiply`."""
    deep = slots(bits)
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
        half: bool,
        tokens: int,
        rows: int,
        groups: int,
        columns: int,
    ) -> None:
        activations = _permute(x, half, tokens, groups, columns, deep)
        row_bytes = 0
        for width in widths:
            row_bytes += groups * ((columns * width + 7) // 8)
        stride = 4 * (activations.size // tokens)
        for row in range(begin, end):
            codes = index + row * row_bytes
            luts = tables + row * groups * lut_bytes
            for token in range(0, tokens - 1, 2):
                at = activations.ctypes.data + token * stride
                two = row_dots(bits, lut, 2, codes, luts, at, stride, groups, columns)
                _put(y, token * rows + row, two[0], half)
                _put(y, (token + 1) * rows + row, two[1], half)
            if tokens % 2:
                at = activations.ctypes.data + (tokens - 1) * stride
                one = row_dots(bits, lut, 1, codes, luts, at, stride, groups, columns)
                _put(y, (tokens - 1) * rows + row, one[0], half)

    return multiply


@cache
def decode_kernel(bits: int, lut: str, out: str) -> Any:
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
                decode_group(bits, lut, out, codes, luts, at, columns)

    return decode
