"""Solve: one weight and the statistics of its inputs to codes and LUTs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sketchconv.calibration.damping import choose_damping
from sketchconv.calibration.factors import Factors
from sketchconv.calibration.grids import LUT_DTYPES
from sketchconv.calibration.methods import needs_statistics, ridge_at
from sketchconv.calibration.rows import Fit, errors
from sketchconv.calibration.spans import Request, fit, fit_plain, one_thread, opened, spread
from sketchconv.calibration.targets import target
from sketchconv.errors import RecipeError, WeightError
from sketchconv.kernels.tables import decode

if TYPE_CHECKING:
    from torch import Tensor

    from sketchconv.calibration.factors import Factor
    from sketchconv.calibration.methods import Method
    from sketchconv.calibration.statistics import Statistics

CHUNK = 512  # rows whose sums are taken at a time


@dataclass(frozen=True, slots=True)
class Solution:
    """A weight that has been sketched.

    Attributes:
        indices: uint8 ``[out, in]``, unpacked, on the CPU.
        lut: ``[out, groups, 2**bits]`` in the LUT's dtype, ascending, on the CPU; of a shaped
            sketch scales and minima, float16 ``[out, groups, fields]``.
        squared_error: float64 ``[out]``, unweighted ``sum (w - decoded)**2``.
        squared_norm: float64 ``[out]``, ``sum w**2``.
        error: ``||(T - Q) X||^2 / ||T X||^2`` on held-out tokens, or else on the calibration
            tokens; T is the weight, or its asymmetric target. None without statistics.
        damping: that was used; None without statistics.
        notes: fallbacks, in words.
    """

    indices: Tensor
    lut: Tensor
    squared_error: Tensor
    squared_norm: Tensor
    error: float | None
    damping: float | None
    notes: tuple[str, ...]


def solve(
    weight: Tensor, bits: int, groups: int, lut_dtype: str, method: Method,
    statistics: Statistics | None = None, *, column_weights: Tensor | None = None,
    threads: int | None = None, factors: Factors | None = None, grid: str = "free",
) -> Solution:  # fmt: skip
    """Sketch one weight.

    Args:
        weight: float32 ``[out, in]``, finite, on the device to compute on. On the CPU the loops
            over columns are compiled; the k-means always runs there.
        bits: 1 to 8.
        groups: LUTs per row, over equal runs of consecutive columns; must divide them.
        lut_dtype: "F16", "BF16" or "F32".
        method: one of `methods.METHODS`.
        statistics: of the inputs, on any device; None only for methods that need none.
        column_weights: ``[in]`` for the k-means, in place of those that the method would take from
            the statistics.
        threads: None: all cores. The result does not depend on it.
        factors: of the same statistics, on the weight's device, shared between weights with the
            same inputs.
        grid: "free", or the shape of the LUTs; then `lut_dtype` is that of the scales, "F16".

    Raises:
        StatisticsError: NaN in the statistics, wrong shapes, or no Hessian at all.
        WeightError: the weight is not finite, or the method needs statistics and has none.
        ValueError: an argument is out of its range.
        LutRangeError: an entry is beyond the range of `lut_dtype`.
    """
    _check(weight, bits, groups, lut_dtype)
    request = Request(bits, groups, lut_dtype, method, threads, grid)
    if not needs_statistics(method):
        found = fit_plain(weight, request, column_weights)
        order = torch.arange(weight.shape[1], device=weight.device)
        return _solution(weight, found, request, order, None, None, ())
    if statistics is None:
        raise WeightError(f"method {method.name} needs statistics of the weight's inputs, got none")
    if factors is None:
        statistics.check(*weight.shape)
        factors = Factors(statistics.on(weight.device))
    goal = _goal(weight, statistics, factors, request)
    damping = choose_damping(goal, request, factors)
    with one_thread(weight):
        factor = factors.factor(damping, act_order=method.act_order)
    found = fit(goal, request, factor, factors.statistics.held_out, column_weights)
    error = _relative_error(goal, found, request, factor, factors.statistics)
    order, notes, damping = factor.order, _notes(factor, damping), factor.damping
    del factors, factor  # two matrices of columns x columns, where no caller shares them
    return _solution(weight, found, request, order, error, damping, notes)


def _check(weight: Tensor, bits: int, groups: int, lut_dtype: str) -> None:
    if weight.ndim != 2 or weight.dtype is not torch.float32:
        raise ValueError(f"weight must be float32 [out, in], got {weight.dtype} {weight.shape}")
    if not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits}, must be 1 to 8")
    if groups < 1 or weight.shape[1] % groups:
        raise ValueError(f"{groups} groups do not divide {weight.shape[1]} columns")
    if lut_dtype not in LUT_DTYPES:
        raise RecipeError(f"lut_dtype is {lut_dtype!r}, must be one of {', '.join(LUT_DTYPES)}")
    bad = ~torch.isfinite(weight)
    if bool(bad.any()):
        row = int(bad.any(1).nonzero()[0])
        raise WeightError(
            f"{int(bad.sum())} values are NaN or infinite, the first in row {row}; repair the "
            "checkpoint or exclude the weight"
        )


def _goal(weight: Tensor, statistics: Statistics, factors: Factors, request: Request) -> Tensor:
    if not request.method.asymmetric:
        return weight
    residual = statistics.residual
    own = None if residual is None else residual.to(weight.device)
    return target(weight, factors, own, ridge_at(request.method, request.bits), request.threads)


def _notes(factor: Factor, damping: float) -> tuple[str, ...]:
    notes = []
    if factor.damping != damping:
        notes.append(f"singular Hessian: damping raised from {damping:g} to {factor.damping:g}")
    if factor.dead:
        notes.append(
            f"{factor.dead} of {factor.order.numel()} inputs were always zero: "
            "their columns are rounded to nearest"
        )
    return tuple(notes)


def _relative_error(
    goal: Tensor, found: Fit, request: Request, factor: Factor, statistics: Statistics
) -> float:
    ruler = statistics.hessian if statistics.held_out is None else statistics.held_out
    ruler = ruler[factor.order][:, factor.order]
    columns = factor.order // (goal.shape[1] // request.groups)

    def work(begin: int, end: int) -> tuple[float, float]:
        part = goal[begin:end][:, factor.order]
        own = opened(Fit(found.codes[begin:end], found.lut[begin:end]), request)
        lost = errors(part, own, columns, ruler)
        kept = (part.double() * (part @ ruler).double()).sum(1)
        return float(lost.sum()), float(kept.sum())

    sums = spread(work, goal, request.threads)
    kept = math.fsum(part[1] for part in sums)
    return math.fsum(part[0] for part in sums) / kept if kept > 0 else 0.0


def _solution(
    weight: Tensor, found: Fit, request: Request, order: Tensor, error: float | None,
    damping: float | None, notes: tuple[str, ...],
) -> Solution:  # fmt: skip
    indices = found.codes[:, order.argsort()].cpu()
    lut, dense = found.lut.cpu(), weight.cpu()
    columns = torch.arange(dense.shape[1]) // (dense.shape[1] // lut.shape[1])
    sums = torch.empty(2, dense.shape[0], dtype=torch.float64)
    for begin in range(0, dense.shape[0], CHUNK):
        end = begin + CHUNK
        part = dense[begin:end].double()
        own = opened(Fit(indices[begin:end], lut[begin:end]), request)
        kept = decode(own.codes, own.lut.float(), columns)
        sums[0, begin:end] = (part - kept.double()).square().sum(1)
        sums[1, begin:end] = part.square().sum(1)
    return Solution(indices, lut, sums[0], sums[1], error, damping, notes)
