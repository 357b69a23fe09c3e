"""What a delta changes in the dense weights of its base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from sketchconv.errors import DeltaError
from sketchconv.projection.matched import Matched
from sketchconv.sources.overlay import OverlaidSketch
from sketchconv.sources.sketch import SketchSource

# Decoded values of a matrix that are held beside the difference.
_PIECE = 4 << 20


def overlaid(delta: Path, base: Path) -> OverlaidSketch:
    """The dense model that a delta makes of its base, opened as a source.

    Raises:
        DeltaError: the delta was not made for this base, or is damaged.
        FormatError: one of the files breaks a rule of its format.
        SourceError: one of them cannot be read.
    """
    from sketchconv.deltas import resolve

    return OverlaidSketch(base, _tables(resolve(delta, base), delta), delta.name)


def _tables(found: Mapping[str, npt.NDArray[Any]], delta: Path) -> Mapping[str, npt.NDArray[Any]]:
    if not found:
        raise DeltaError(f"{delta.name}: changes nothing, so there is nothing to export")
    return found


class Difference:
    """Differences ``[out, in]`` of the weights that a delta changes.

    Args:
        tuned: the base with the delta; stays open, and is closed by who opened it.
        base: the base itself; likewise.
    """

    def __init__(self, tuned: OverlaidSketch, base: SketchSource) -> None:
        self._tuned, self._base = Matched(tuned, base, "the delta"), base

    def of(self, name: str) -> Tensor:
        """The whole difference of one weight: float32 ``[out, in]``."""
        rows, columns = self._base.records[name].shape
        out = torch.empty(rows, columns)
        step = max(1, _PIECE // columns)
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            old = self._base.float32(name, self._base.rows(name, begin, end))
            out[begin:end] = torch.from_numpy(self._tuned.rows(name, begin, end) - old)
        return out
