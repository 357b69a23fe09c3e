"""Weights that too few tokens reach: what the compressed block computes with instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from sketchconv.calibration.linears import put_rows
from sketchconv.kernels.cpu import LutRangeError, solve_rows

if TYPE_CHECKING:
    from sketchconv.calibration.weights import Weights
    from sketchconv.formats.manifest import SketchRecord

_ROWS = 1024


def put_fallback(
    module: nn.Module, record: SketchRecord, weights: Weights, threads: int | None
) -> None:
    """Give a module the values of k-means with equal weights.

    The writer fits the weight itself, by the recipe; the blocks behind must only not take it for
    dense. Where no LUT can hold it the module stays as it is: the writer will say so.

    Args:
        module: linear, in the compressed block.
        record: of its weight.
        weights: to read the dense weight from.
        threads: of the solver; the values do not depend on it.
    """
    dense = weights.float32(record.name).numpy()
    for begin in range(0, len(dense), _ROWS):
        part = np.ascontiguousarray(dense[begin : begin + _ROWS])
        try:
            solved = solve_rows(part, record.bits, record.groups, threads=threads)
        except LutRangeError:
            return
        codes = solved.indices.reshape(len(part), record.groups, -1).astype(np.intp)
        values = np.take_along_axis(solved.lut.astype(np.float32), codes, axis=2)
        put_rows(module, begin, torch.from_numpy(values.reshape(part.shape)))
