"""Rows: codes and LUTs for a span of a weight's rows, from their grid on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sketchconv.kernels.compensation import compensate
from sketchconv.kernels.descent import descend
from sketchconv.kernels.refit import refit
from sketchconv.kernels.tables import decode, encode, make_tables, sort_entries

if TYPE_CHECKING:
    from torch import Tensor

    from sketchconv.calibration.factors import Factor
    from sketchconv.calibration.methods import Method


@dataclass(frozen=True, slots=True)
class Fit:
    """Rows that have been solved; columns in the order of their factor.

    Attributes:
        codes: uint8 ``[rows, in]``.
        lut: ``[rows, groups, k]`` in the dtype that is stored, ascending.
    """

    codes: Tensor
    lut: Tensor


def fit_rows(
    weight: Tensor, grids: Sequence[Tensor], groups: Tensor, factor: Factor, method: Method,
    judge: Tensor | None = None,
) -> Fit:  # fmt: skip
    """Codes and LUTs for rows of a weight.

    Args:
        weight: float32 ``[rows, in]`` in the order of the factor.
        grids: to start from, ``[rows, groups, k]``, ascending, in the dtype that is stored; each
            row takes the one with the least error on the calibration tokens.
        groups: int64 ``[in]``, group of each column, in the order of the factor.
        factor: of the damped Hessian.
        method: what to do.
        judge: held-out Hessian in the order of the factor: each row keeps the round that it calls
            best. None: the last.
    """
    starts = [_rounded(weight, grid, groups, factor, method) for grid in grids]
    best = found = _best(weight, starts, groups, factor.hessian)
    for _ in range(method.rounds):
        found = improve(weight, found, groups, factor.hessian, method)
        best = found if judge is None else _best(weight, (best, found), groups, judge)
    return best


def _rounded(weight: Tensor, grid: Tensor, groups: Tensor, factor: Factor, method: Method) -> Fit:
    tables = make_tables(grid.float(), groups)
    if method.compensate:
        return Fit(compensate(weight, factor.upper, tables), grid)
    return Fit(encode(weight, tables), grid)


def _best(weight: Tensor, fits: Sequence[Fit], groups: Tensor, hessian: Tensor) -> Fit:
    """Of each row the fit with the least error, the first among equals."""
    best = fits[0]
    if len(fits) == 1:
        return best
    least = errors(weight, best, groups, hessian)
    for fit in fits[1:]:
        now = errors(weight, fit, groups, hessian)
        better = now < least
        best = Fit(
            torch.where(better[:, None], fit.codes, best.codes),
            torch.where(better[:, None, None], fit.lut, best.lut),
        )
        least = torch.minimum(now, least)
    return best


def improve(weight: Tensor, before: Fit, groups: Tensor, hessian: Tensor, method: Method) -> Fit:
    """One round: coordinate descent, a refit of the LUTs, and descent to the LUTs as stored."""
    fit, gradient = _descended(weight, before, groups, hessian, method.sweeps)
    if not method.refit_steps:
        return fit
    tables = make_tables(before.lut.float(), groups)
    lut = refit(fit.codes, gradient, hessian, tables, method.refit_steps)[0]
    limit = torch.finfo(before.lut.dtype).max
    stored = lut.clamp(-limit, limit).to(before.lut.dtype)
    codes, sorted_lut = sort_entries(fit.codes, stored.float(), groups)
    found = Fit(codes, sorted_lut.to(before.lut.dtype))
    return _descended(weight, found, groups, hessian, method.last_sweeps)[0]


def _descended(
    weight: Tensor, before: Fit, groups: Tensor, hessian: Tensor, sweeps: int
) -> tuple[Fit, Tensor]:
    """After some sweeps of coordinate descent, with the gradient ``(W - Q) H``."""
    codes, lut = before.codes, before.lut.float()
    tables = make_tables(lut, groups)
    gradient = (weight - decode(codes, lut, groups)) @ hessian
    for _ in range(sweeps):
        codes, gradient = descend(codes, gradient, hessian, tables)
    return Fit(codes, before.lut), gradient


def errors(weight: Tensor, fit: Fit, groups: Tensor, hessian: Tensor) -> Tensor:
    """``(w - q) H (w - q)'`` of each row: float64 ``[rows]``."""
    gap = weight - decode(fit.codes, fit.lut.float(), groups)
    return (gap.double() * (gap @ hessian).double()).sum(1)
