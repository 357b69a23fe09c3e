"""Tables of affine grids: `scale * (q - zero)` for every index q, rounded as torch rounds it."""

from __future__ import annotations

import numpy as np

from sketchconv.errors import SourceError
from sketchconv.formats.tensors import carried_to_f32, f32_to_bf16
from sketchconv.importers.base import Carrier

SCALES = ("F16", "BF16", "F32")


def affine_tables(scales: Carrier, zeros: Carrier, bits: int, dtype: str) -> Carrier:
    """Tables ``[rows, G, 2**bits]`` in the carrier of `dtype`.

    The difference of two indices is exact in every dtype of scales (at most 9 bits), and its
    product with a 16-bit scale is exact in float32 (at most 20 bits); so the one rounding here is
    that of a product in `dtype`.

    Args:
        scales: ``[rows, G]`` in the carrier of `dtype`.
        zeros: integers ``[rows, G]``.
        bits: index width.
        dtype: F16, BF16 or F32.
    """
    steps = np.arange(1 << bits, dtype=np.float32) - zeros[..., None].astype(np.float32)
    values = carried_to_f32(scales, dtype)[..., None] * steps
    if dtype == "BF16":
        return f32_to_bf16(values)
    with np.errstate(over="ignore"):
        return values.astype("<f2" if dtype == "F16" else "<f4")


def check_integer(value: object, what: str, where: str) -> int:
    """A setting that must be a whole number.

    Raises:
        SourceError: it is none.
    """
    if type(value) is not int:
        raise SourceError(f"{where}: {what} must be an integer, got {value!r}")
    return value
