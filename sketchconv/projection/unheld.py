"""What a fine-tune changed beside the sketched weights: a delta of LUTs cannot hold it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sketchconv.formats.tensors import TensorInfo
from sketchconv.sources.base import FLOATS, Float32

if TYPE_CHECKING:
    from sketchconv.projection.matched import Matched
    from sketchconv.sources.sketch import SketchSource

_PIECE = 4 << 20  # values that are compared at a time


@dataclass(frozen=True, slots=True)
class Unheld:
    """A tensor that the fine-tune changed and that is not sketched.

    Attributes:
        name: the sketch's name of it, or the checkpoint's where the sketch has none.
        change: ``|tuned - base| / |base|``; None where that makes no sense.
        reason: in words.
    """

    name: str
    change: float | None
    reason: str

    def __str__(self) -> str:
        size = "" if self.change is None else f", relative change {self.change:.2e}"
        return f"{self.name} ({self.reason}{size})"


def unheld(base: SketchSource, tuned: Matched) -> list[Unheld]:
    """Compare everything that is no sketched weight; tensors that are equal are left out.

    Raises:
        WeightError: a tuned parameter is NaN or infinite.
    """
    found = [_plain(base, tuned, info) for name, info in base.infos.items()
             if name not in base.records]  # fmt: skip
    found += [_untied(base, tuned, name) for name in tuned.surplus if name in base.aliases]
    found += _unknown(base, tuned)
    return [entry for entry in found if entry is not None]


def _plain(base: SketchSource, tuned: Matched, info: TensorInfo) -> Unheld | None:
    name, float_sums = info.name, _Sums()
    for begin, end in _pieces(info):
        raw = base.rows(name, begin, end)
        if info.dtype in FLOATS:
            float_sums.add(tuned.rows(name, begin, end), base.float32(name, raw))
        elif tuned.info(name).dtype != info.dtype or tuned.raw(name, begin, end) != raw:
            return Unheld(name, None, "not sketched, and not of floats")
    return None if float_sums.equal else Unheld(name, float_sums.relative, "not sketched")


def _untied(base: SketchSource, tuned: Matched, name: str) -> Unheld | None:
    """A weight that the base shares with another: it must still be equal to it."""
    kept, sums = base.aliases[name], _Sums()
    info = tuned.infos[name]
    if info.shape != tuned.info(kept).shape:
        return Unheld(name, None, f"the base shares it with {kept}, which has another shape")
    for begin, end in _pieces(info):
        sums.add(tuned.surplus_rows(name, begin, end), tuned.rows(kept, begin, end))
    return None if sums.equal else Unheld(name, sums.relative, f"no longer tied to {kept}")


def _unknown(base: SketchSource, tuned: Matched) -> list[Unheld]:
    """Tensors that the base has not, though the checkpoint's own architecture has them."""
    names = [name for name in tuned.surplus if name not in base.aliases]
    if not names:
        return []
    from sketchconv.architecture import map_model

    extra = set(map_model(tuned.source.config(), tuned.source.infos).extra)
    return [Unheld(n, None, "the base has no such tensor") for n in names if n not in extra]


def _pieces(info: TensorInfo) -> Iterator[tuple[int, int]]:
    rows = info.shape[0] if info.shape else 1
    size = max(1, _PIECE * rows // max(1, math.prod(info.shape)))
    return ((begin, min(begin + size, rows)) for begin in range(0, rows, size))


class _Sums:
    """Squared norms of a difference and of what it is measured by."""

    def __init__(self) -> None:
        self._apart: list[float] = []
        self._norm: list[float] = []
        self.equal = True

    def add(self, new: Float32, old: Float32) -> None:
        """Take in the next rows; infinities that both have, as masks do, are equal."""
        same = (new == old) | (np.isnan(new) & np.isnan(old))
        self.equal = self.equal and bool(same.all())
        apart = np.where(same, 0.0, new.astype(np.float64) - old)
        self._apart.append(float(np.square(apart).sum()))
        self._norm.append(
            float(np.square(np.where(np.isfinite(old), old, 0.0), dtype=np.float64).sum())
        )

    @property
    def relative(self) -> float | None:
        """Norm of the difference over that of the old values; None for old values of 0."""
        norm, apart = math.fsum(self._norm), math.fsum(self._apart)
        return math.sqrt(apart / norm) if norm > 0 and math.isfinite(apart) else None
