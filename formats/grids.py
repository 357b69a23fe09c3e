"""Grids: the fixed levels of shaped LUTs, whose entries are `scale * level + minimum`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sketchconv.formats.tensors import F32Array, U8Array

FREE: Final = "free"
COLUMNS: Final = 32
"""Groups of shaped LUTs have a multiple of so many columns."""

_CODEBOOK: Final = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True, slots=True)
class Grid:
    """One shape of LUTs.

    Args:
        bits: widths of an index that it has levels for.
        has_minimum: whether a minimum is stored beside the scale.
    """

    bits: tuple[int, ...]
    has_minimum: bool

    @property
    def fields(self) -> int:
        """Values per group: the scale, and behind it the minimum."""
        return 2 if self.has_minimum else 1


GRIDS: Final[Mapping[str, Grid]] = MappingProxyType(
    {
        "affine": Grid((4, 5), True),
        "iq4_nl": Grid((4,), False),
        "symmetric": Grid((4, 5, 8), False),
    }
)
"""Every grid but the free one, by its name."""


def levels(grid: str, bits: int) -> F32Array:
    """The levels of a grid in the order of the indices: float32 `[2^bits]`, whole numbers.

    Raises:
        ValueError: no such grid, or none of that width.
    """
    if grid not in GRIDS or bits not in GRIDS[grid].bits:
        raise ValueError(f"no grid {grid!r} of {bits} bits")
    if grid == "iq4_nl":
        return np.array(_CODEBOOK, np.float32)
    first = 0 if grid == "affine" else -(1 << (bits - 1))
    return np.arange(first, first + (1 << bits), dtype=np.float32)


def expand(table: npt.NDArray[np.float16], grid: str, bits: int) -> F32Array:
    """LUTs float32 `[..., 2^bits]` of scales (and minima) `[..., fields]`.

    A float16 times a level is exact in float32; the sum with the minimum is rounded once.
    """
    scale = table[..., :1].astype(np.float32)
    lut: F32Array = scale * levels(grid, bits)
    return lut + table[..., 1:].astype(np.float32) if GRIDS[grid].has_minimum else lut


def decode(codes: U8Array, table: npt.NDArray[Any], grid: str, bits: int) -> F32Array:
    """Weights float32 `[rows, columns]` of indices and scales `[rows, G, fields]`; no LUT is made.

    Args:
        codes: `[rows, columns]`.
        table: float16, scales and minima.
        grid, bits: as `levels`.
    """
    rows, columns = codes.shape
    out = levels(grid, bits)[codes].reshape(rows, table.shape[1], -1)
    out *= table[..., :1].astype(np.float32)
    if GRIDS[grid].has_minimum:
        out += table[..., 1:].astype(np.float32)
    return out.reshape(rows, columns)
