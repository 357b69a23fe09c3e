"""How a delta writes changed tables: mode, value type, and the exact arithmetic of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sketchconv.formats.errors import refuse, shown
from sketchconv.formats.rules import MAX_INTEGER
from sketchconv.formats.tensors import (
    DTYPES,
    F32Array,
    bf16_to_f32,
    carried_to_f32,
    f32_to_bf16,
)

Table = npt.NDArray[Any]

MODES: Final = ("xor", "replace", "add")
SAME: Final = "same"
CODES: Final = "I8"
VALUES: Final = (SAME, "F16", "BF16", CODES)
STEP: Final = np.float32(2.0**-7)
"""What a scale is multiplied with beside its code: the scale is about the largest difference."""

_MOST_CODE: Final = 127
_BITS: Final = {2: "U16", 4: "U32"}


@dataclass(frozen=True, slots=True)
class Coding:
    """How the changed tables of a delta are stored.

    Args:
        mode: `"xor"` (bit patterns, exact, undone by itself), `"replace"` (new values) or `"add"`
            (differences).
        values: `"same"`, the dtype of the base's table; `"F16"`, `"BF16"`; or `"I8"` with a scale.
        span: for I8 how many changed groups share a scale; else 0.
    """

    mode: str = "xor"
    values: str = SAME
    span: int = 0

    @property
    def scaled(self) -> bool:
        """Whether values are 8-bit codes with scales."""
        return self.values == CODES

    @property
    def invertible(self) -> bool:
        """Whether the base's table follows from the tuned one and the delta alone."""
        return self.mode == "xor"

    def check(self, where: str) -> None:
        """Check the three members together.

        Raises:
            FormatError: DLT-004 to DLT-006.
        """
        if self.mode not in MODES:
            refuse("DLT-004", where, f"mode must be one of {list(MODES)}, got {shown(self.mode)}")
        if self.values not in VALUES:
            got = shown(self.values)
            refuse("DLT-005", where, f"values must be one of {list(VALUES)}, got {got}")
        if self.mode == "xor" and self.values != SAME:
            refuse("DLT-005", where, f"values of mode xor must be 'same', got {self.values}")
        if self.scaled and self.mode != "add":
            refuse("DLT-005", where, f"values I8 need mode add, got {self.mode}")
        if type(self.span) is not int or not int(self.scaled) <= self.span <= MAX_INTEGER:
            refuse("DLT-006", where, f"bad span {shown(self.span)}")
        if not self.scaled and self.span != 0:
            refuse("DLT-006", where, f"span must be 0 without I8, got {self.span}")

    def stored_dtype(self, lut_dtype: str) -> str:
        """The dtype of `delta_lut` for a table of `lut_dtype`."""
        if self.mode == "xor":
            return _BITS[DTYPES[lut_dtype].itemsize]
        return lut_dtype if self.values == SAME else self.values

    def encode(self, base: Table, tuned: Table, lut_dtype: str) -> tuple[Table, Table | None]:
        """Write the changed groups of one table.

        Args:
            base, tuned: `[n, K]` in the carrier of `lut_dtype`, finite.
            lut_dtype: F16, BF16 or F32.

        Returns:
            What `delta_lut` holds, `[n, K]`, and for I8 the scales float16 `[ceil(n / span)]`.
            A value beyond the range of its type becomes infinite: the caller refuses it.
        """
        if self.mode == "xor":
            bits = DTYPES[self.stored_dtype(lut_dtype)].numpy
            return base.view(bits) ^ tuned.view(bits), None
        if self.mode == "replace" and self.stored_dtype(lut_dtype) == lut_dtype:
            return tuned, None
        values = carried_to_f32(tuned, lut_dtype)
        if self.mode == "add":
            values = values - carried_to_f32(base, lut_dtype)
        if self.scaled:
            return _coded(values, self.span)
        return rounded(values, self.stored_dtype(lut_dtype)), None

    def decode(self, base: Table, stored: Table, scales: Table | None, lut_dtype: str) -> Table:
        """Return the tuned groups, the normative arithmetic of `spec/delta.md`.

        Args:
            base: `[n, K]`, the base's groups in the carrier of `lut_dtype`; for xor the tuned
                groups give the base's back.
            stored: `[n, K]`, of `delta_lut`.
            scales: float16 `[ceil(n / span)]` for I8, else None.
            lut_dtype: F16, BF16 or F32.

        Returns:
            `[n, K]` in the carrier of `lut_dtype`; not checked for infinities.
        """
        if self.mode == "xor":
            bits = DTYPES[self.stored_dtype(lut_dtype)].numpy
            out: Table = (base.view(bits) ^ stored).view(DTYPES[lut_dtype].numpy)
            return out
        if self.mode == "replace" and self.stored_dtype(lut_dtype) == lut_dtype:
            return stored
        if scales is None:
            values = carried_to_f32(stored, self.stored_dtype(lut_dtype))
        else:
            each = _per_group(scales, self.span, len(stored))
            # At most 18 significant bits: the product is exact.
            values = stored.astype(np.float32) * each * STEP
        if self.mode == "add":
            with np.errstate(over="ignore"):
                values = carried_to_f32(base, lut_dtype) + values
        return rounded(values, lut_dtype)


def rounded(values: F32Array, dtype: str) -> Table:
    """Round float32 to F16, BF16 or F32 in its carrier: nearest, ties to even; may overflow."""
    if dtype == "BF16":
        return f32_to_bf16(values)
    with np.errstate(over="ignore"):
        return values.astype(DTYPES[dtype].numpy)


def finite(table: Table, dtype: str) -> npt.NDArray[np.bool_]:
    """Which elements of a float table in its carrier are finite."""
    return np.isfinite(bf16_to_f32(table) if dtype == "BF16" else table)


def _per_group(scales: Table, span: int, count: int) -> F32Array:
    """The scale of each changed group, float32 `[count, 1]`; a span may be any number."""
    out: F32Array = scales.astype(np.float32)[np.arange(count) // span, None]
    return out


def _coded(values: F32Array, span: int) -> tuple[Table, Table]:
    """8-bit codes `[n, K]` and scales float16 `[ceil(n / span)]` of differences `[n, K]`."""
    starts = np.arange(0, len(values), span)
    most = np.maximum.reduceat(np.abs(values).max(axis=1), starts)
    with np.errstate(over="ignore"):
        scales = (most / (_MOST_CODE * STEP)).astype(np.float16)
    each = _per_group(scales, span, len(values)) * STEP
    steps = np.zeros_like(values)
    np.divide(values, each, out=steps, where=(each > 0) & np.isfinite(each))
    return np.clip(np.rint(steps), -_MOST_CODE, _MOST_CODE).astype(np.int8), scales
