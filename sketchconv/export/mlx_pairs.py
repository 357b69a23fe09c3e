"""Tables of a sketch as the scale and bias of MLX's affine mode, where that is exact.

MLX's value of index k is ``scale * k + bias`` in the dtype of scales and biases. Where it is
rounded depends on the kernel (read in MLX 0.32): `dequantize` on the CPU rounds product and sum,
Metal's loaders compute in float32 and round the sum, and a compiler may fuse the two. So a pair is
taken only where all of these give the entry.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sketchconv.formats.grids import GRIDS, levels
from sketchconv.formats.mlx_words import WIDTHS
from sketchconv.formats.sketches import SketchRecord
from sketchconv.formats.tensors import (
    DTYPES,
    F32Array,
    U8Array,
    bf16_to_f32,
    carried_to_f32,
    f32_to_bf16,
)


@dataclass(frozen=True, slots=True)
class Pairs:
    """Scales and biases of some rows, and how their indices are renumbered.

    Attributes:
        scales, biases: ``[rows, G]`` in the carrier of their dtype.
        order: the new index of each old one, uint8 ``[2^bits]`` or ``[rows, G, 2^bits]``; None
            where they stay.
    """

    scales: npt.NDArray[Any]
    biases: npt.NDArray[Any]
    order: U8Array | None

    def codes(self, codes: U8Array) -> U8Array:
        """MLX's indices of those of a sketch, both uint8 ``[rows, G, columns]``."""
        if self.order is None:
            return codes
        if self.order.ndim == 1:
            return self.order[codes]
        found: U8Array = np.take_along_axis(self.order, codes, axis=-1)
        return found


def width_of(record: SketchRecord) -> int:
    """Bits of MLX's indices: enough for the distance of the outer levels."""
    span = int(np.ptp(_levels(record))) if record.shaped else (1 << record.bits) - 1
    return next(width for width in WIDTHS if span >> width == 0)


def fit(record: SketchRecord, tables: npt.NDArray[Any], dtype: str) -> Pairs | None:
    """Scales and biases that give every entry of some tables, or None if there are none.

    A zero may lose its sign, since MLX's sums have none at zero.

    Args:
        record: how the weight is stored.
        tables: LUTs ``[rows, G, 2^bits]``, or scales (and minima) ``[rows, G, fields]`` of a grid,
            in their carrier.
        dtype: F16, BF16 or F32, of MLX's scales and biases.
    """
    values = carried_to_f32(tables, record.lut_dtype)
    return (_of_grid if record.shaped else _of_luts)(record, values, dtype)


def _levels(record: SketchRecord) -> F32Array:
    return levels(record.grid, record.bits)


def _of_grid(record: SketchRecord, fields: F32Array, dtype: str) -> Pairs | None:
    """A grid's levels are whole numbers: counted from the lowest, they are MLX's indices."""
    own = _levels(record)
    scale, steps = fields[..., :1], own - own[0]
    minimum = fields[..., 1:] if GRIDS[record.grid].has_minimum else np.float32(0)
    bias = scale * own[0] + minimum
    if _always(record, dtype):
        if not np.isfinite(fields).all():
            return None
    elif not reproduces(scale, bias, steps, scale * own + minimum, dtype).all():
        return None
    order = None if np.array_equal(steps, np.arange(len(steps))) else steps.astype(np.uint8)
    return Pairs(_carried(scale[..., 0], dtype), _carried(bias[..., 0], dtype), order)


def _always(record: SketchRecord, dtype: str) -> bool:
    """Whether float32 gives every entry of a grid, which then need not be made: of 8 bits in groups
    of 32 there are eight for each weight.

    A float16 times a whole number below 256 is exact in float32, and so is the sum of two such
    products; a minimum goes with levels from 0 up, where entry and MLX's value are the same sum.
    """
    from_zero = float(_levels(record)[0]) == 0
    exact = record.lut_dtype == "F16" and (from_zero or not GRIDS[record.grid].has_minimum)
    return dtype == "F32" and exact


def _of_luts(record: SketchRecord, luts: F32Array, dtype: str) -> Pairs | None:
    """Entries in equal steps, in any order: from the lowest one up, or from the highest down."""
    rank = np.argsort(np.argsort(luts, axis=-1, kind="stable"), axis=-1).astype(np.float32)
    top = np.float32(luts.shape[-1] - 1)
    found = np.zeros(luts.shape[:2], bool)
    scales, biases, steps = np.zeros_like(luts[..., 0]), np.zeros_like(luts[..., 0]), rank.copy()
    for scale, bias, new in _candidates(luts, rank, top, dtype):
        fits = reproduces(scale[..., None], bias[..., None], new, luts, dtype).all(axis=-1)
        fits &= ~found
        scales[fits], biases[fits], steps[fits] = scale[fits], bias[fits], new[fits]
        found |= fits
        if found.all():
            same = np.array_equal(steps, np.broadcast_to(np.arange(luts.shape[-1]), steps.shape))
            order = None if same else steps.astype(np.uint8)
            return Pairs(_carried(scales, dtype), _carried(biases, dtype), order)
    return None


def _candidates(
    luts: F32Array, rank: F32Array, top: np.float32, dtype: str
) -> Iterator[tuple[F32Array, F32Array, F32Array]]:
    """Scales ``[rows, G]``, biases and indices to try: a mean step, and the values beside it."""
    low, high = luts.min(axis=-1), luts.max(axis=-1)
    step = _carried((high - low) / top, dtype)
    whole = step.view(f"<i{step.dtype.itemsize}")
    for shift in (0, 1, -1):
        # Of a positive float the next one is the next whole number; zero has none below.
        moved = np.maximum(whole + np.asarray(shift, whole.dtype), 0).view(step.dtype)
        scale = carried_to_f32(moved, dtype)
        yield scale, low, rank
        yield -scale, high, top - rank


def reproduces(
    scale: F32Array, bias: F32Array, steps: F32Array, target: F32Array, dtype: str
) -> npt.NDArray[np.bool_]:
    """Whether MLX computes `target` of scales, biases and indices (all float32), entry by entry.

    Scales and biases are rounded to `dtype` first. The product must be exact in float32, and for a
    shorter dtype the sum as well, so that fused operations give the same.
    """
    scale, bias = _rounded(scale, dtype), _rounded(bias, dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        product = scale * steps
        once = _rounded(product + bias, dtype)
        twice = _rounded(_rounded(product, dtype) + bias, dtype)
        whole = scale.astype(np.float64) * steps
        exact = product == whole
        if dtype != "F32":
            # Then a sum that is fused in the short dtype is rounded no other way than `once`.
            exact &= product + bias == whole + bias
    fits: npt.NDArray[np.bool_] = (once == target) & (twice == target) & exact
    return fits


def _carried(values: F32Array, dtype: str) -> npt.NDArray[Any]:
    """Rounded to a dtype, in its carrier."""
    if dtype == "BF16":
        return f32_to_bf16(values)
    with np.errstate(over="ignore"):
        return values.astype(DTYPES[dtype].numpy)


def _rounded(values: F32Array, dtype: str) -> F32Array:
    if dtype == "F32":
        return values
    carried = _carried(values, dtype)
    return bf16_to_f32(carried) if dtype == "BF16" else carried.astype(np.float32)
