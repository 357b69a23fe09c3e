"""float32 rounded to float16, by integers: not every CPU has the instruction."""

from __future__ import annotations

from typing import Any

import numpy as np

from sketchconv.kernels.jit import inner

_SMALLEST_NORMAL = 0x38800000  # 2**-14
_TOO_LARGE = 0x47800000  # 2**16
_INFINITE = 0x7F800000
_REBIAS = 112 << 23


@inner
def round_half(value: Any) -> Any:
    """Bits of the nearest float16, ties to even, and its value; a NaN becomes the quiet one."""
    word = np.float32(value).view(np.uint32)
    sign = word & np.uint32(0x80000000)
    size = word & np.uint32(0x7FFFFFFF)
    if size > _INFINITE:
        half, wide = np.uint32(0x7E00), np.uint32(0x7FC00000)
    elif size < _SMALLEST_NORMAL:
        # One half has units of 2**-24, as subnormal halves have: the sum rounds as wanted.
        small = np.float32(np.uint32(size).view(np.float32) + np.float32(0.5))
        half = np.uint32(small.view(np.uint32) - np.uint32(0x3F000000))
        wide = np.float32(np.float32(half) * np.float32(2.0**-24)).view(np.uint32)
    else:
        odd = (size >> np.uint32(13)) & np.uint32(1)
        rounded = np.uint32(size + np.uint32(0xFFF) + odd) >> np.uint32(13)
        half = np.uint32(rounded - np.uint32(_REBIAS >> 13))
        wide = np.uint32(rounded << np.uint32(13))
        if size >= _TOO_LARGE or half >= 0x7C00:
            half, wide = np.uint32(0x7C00), np.uint32(_INFINITE)
    bits = np.uint16(half | (sign >> np.uint32(16)))
    return bits, np.uint32(wide | sign).view(np.float32)
