"""Rounding inside a kernel, the same when it is compiled and in Triton's interpreter.

The interpreter keeps bfloat16 as bare 16-bit integers: its arithmetic on them is silently wrong and
its conversion cuts bits off. So under `WIDE` every number is float32, rounded by hand.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl

from sketchconv.kernels.gpu.jit import jit


@jit
def rounded(value: tl.tensor, DTYPE: tl.constexpr, WIDE: tl.constexpr) -> Any:
    """`value` rounded to nearest even as DTYPE; under WIDE a float32 that holds that number.

    Args:
        value: of any float dtype.
        DTYPE: `tl.float16`, `tl.bfloat16` or `tl.float32`.
        WIDE: whether the interpreter runs (`sketchconv.kernels.gpu.support.interpreting`).
    """
    if WIDE:
        value = value.to(tl.float32)
        if tl.bfloat16 == DTYPE:
            bits = value.to(tl.uint32, bitcast=True)
            near = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            result = tl.where(value == value, near.to(tl.float32, bitcast=True), value)
        else:
            result = value.to(DTYPE).to(tl.float32)
    else:
        result = value.to(DTYPE)
    return result


@jit
def put(places: tl.tensor, value: tl.tensor, mask: tl.tensor, WIDE: tl.constexpr) -> Any:
    """Store float32 `value`, rounded to the dtype of `places`."""
    DTYPE: tl.constexpr = places.dtype.element_ty
    tl.store(places, rounded(value, DTYPE, WIDE).to(DTYPE), mask=mask)
