"""NumPy reference of the kernels that run sketches: plain, slow, obviously right."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sketchconv.kernels.planes import fields

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]


def lut_float32(lut: NDArray[Any]) -> F32:
    """A LUT's carrier (float16, float32, or uint16 holding bfloat16) as float32."""
    if lut.dtype == np.uint16:
        return (lut.astype(np.uint32) << 16).view(np.float32)
    return lut.astype(np.float32)


def unpack(index: U8, bits: int, columns: int) -> U8:
    """Codes uint8 ``[rows, columns]`` of a packed index ``[rows, groups, bytes]``."""
    rows, groups, _ = index.shape
    width = columns // groups
    codes = np.zeros((rows, groups, width), np.uint8)
    base, shift = 0, 0
    for field in fields(bits):
        size = -(-width * field // 8)
        plane = np.unpackbits(index[..., base : base + size], axis=-1, bitorder="little")
        flags = plane[..., : width * field].reshape(rows, groups, width, field)
        for bit in range(field):
            codes |= flags[..., bit] << np.uint8(shift + bit)
        base, shift = base + size, shift + field
    return codes.reshape(rows, columns)


def dequantize(index: U8, lut: NDArray[Any], columns: int) -> F32:
    """`W[r, c] = lut[r, c // (columns / groups), code[r, c]]` as float32 ``[rows, columns]``."""
    rows, groups, entries = lut.shape
    codes = unpack(index, entries.bit_length() - 1, columns).reshape(rows, groups, -1)
    return np.take_along_axis(lut_float32(lut), codes, axis=-1).reshape(rows, columns)


def linear(x: F32, index: U8, lut: NDArray[Any]) -> NDArray[np.float64]:
    """`x @ W.T` in float64, for `x` float32 ``[tokens, columns]``."""
    weight = dequantize(index, lut, x.shape[-1]).astype(np.float64)
    return x.astype(np.float64) @ weight.T
