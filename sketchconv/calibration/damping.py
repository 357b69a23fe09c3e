"""Damping: how much to add to a Hessian's diagonal, judged on tokens kept apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sketchconv.calibration.rows import errors
from sketchconv.calibration.spans import Request, fit, one_thread, opened
from sketchconv.kernels.cpu import LutRangeError
from sketchconv.memory import give_back

if TYPE_CHECKING:
    from torch import Tensor

    from sketchconv.calibration.factors import Factor, Factors
    from sketchconv.calibration.rows import Fit

SAMPLE = 96  # rows on which the choice is made


def choose_damping(weight: Tensor, request: Request, factors: Factors) -> float:
    """The damping with the least held-out error on a sample of the rows, spread evenly.

    Args:
        weight: float32 ``[out, in]``, the target.
        request: what is asked; `Request.method` names the choice.
        factors: of the layer's inputs, with their held-out part.

    Returns:
        One of the method's dampings; its fixed one where nothing is held out.
    """
    method = request.method
    if factors.statistics.held_out is None or not method.dampings:
        return method.damping
    rows = torch.linspace(0, weight.shape[0] - 1, min(SAMPLE, weight.shape[0])).long()
    sample = weight[rows.to(weight.device)]
    scores: list[float] = []
    for damping in method.dampings:
        scores.append(_score(sample, rows, request, factors, damping, factors.statistics.held_out))
        best = method.dampings[scores.index(min(scores))]
        factors.keep_only(best)  # each has two matrices of columns x columns
        give_back()  # or what one damping has freed stays beside what the next one takes
    return best


def _score(
    sample: Tensor, rows: Tensor, request: Request, factors: Factors, damping: float, judge: Tensor
) -> float:
    """The held-out error of the sample with one damping."""
    with one_thread(sample):
        factor = factors.factor(damping, act_order=request.method.act_order)
    groups = factor.order // (sample.shape[1] // request.groups)
    found = opened(_fit_sample(sample, rows, request, factor), request)
    ruler = judge[factor.order][:, factor.order]
    with one_thread(sample):
        return float(errors(sample[:, factor.order], found, groups, ruler).sum())


def _fit_sample(sample: Tensor, rows: Tensor, request: Request, factor: Factor) -> Fit:
    try:
        return fit(sample, request, factor, None)
    except LutRangeError as error:
        raise LutRangeError(int(rows[error.row]), error.value, error.lut_dtype) from None
