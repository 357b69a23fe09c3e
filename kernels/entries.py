"""LUT entries: the numbers by which kernels know their dtypes, and bfloat16 rounding of results."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import numpy as np

from sketchconv.kernels.jit import inner

F16, BF16, F32 = 0, 1, 2
KINDS = MappingProxyType({"F16": F16, "BF16": BF16, "F32": F32})


@inner
def round_bf16(value: Any) -> Any:
    """Bits of the nearest bfloat16, ties to even; a NaN stays a (quiet) NaN."""
    word = np.float32(value).view(np.uint32)
    if word & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):
        return np.uint16((word >> np.uint32(16)) | np.uint32(0x40))
    odd = (word >> np.uint32(16)) & np.uint32(1)
    return np.uint16((word + np.uint32(0x7FFF) + odd) >> np.uint32(16))
