"""Shaped rows: codes, scales and minima of a fixed codebook, fitted to a Hessian.

The search is that of `rows.py`, with the entries of each group tied to a scale (and a minimum):
rounding with compensation, then rounds of coordinate descent and a refit. Inside, codes count the
entries of a group from below, as the kernels want them; a negative scale turns the order of the
levels round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from sketchconv.calibration.rows import Fit, errors
from sketchconv.errors import WeightError
from sketchconv.formats.grids import levels
from sketchconv.kernels.compensation import compensate
from sketchconv.kernels.descent import descend
from sketchconv.kernels.ggml.shaped import fit as fit_groups
from sketchconv.kernels.ggml.shaped import key_of
from sketchconv.kernels.scales import refit_scales
from sketchconv.kernels.tables import Tables, decode, encode, make_tables
from sketchconv.shaping import relative, table_of

if TYPE_CHECKING:
    from torch import Tensor

    from sketchconv.calibration.factors import Factor
    from sketchconv.calibration.methods import Method


def start(
    weight: Tensor, grid: str, bits: int, groups: int, masses: Tensor | None, threads: int | None
) -> Fit:
    """Scales with the least weighted squared error, and the codes that come with them.

    Args:
        weight: float32 ``[rows, in]``, columns in their original order.
        grid, bits: of the sketch.
        groups: per row.
        masses: ``[in]``, weights of the columns; None: equal.
        threads: of the fit.

    Returns:
        Codes uint8 of the levels and scales float16 ``[rows, groups, fields]``.

    Raises:
        WeightError: a value is beyond the reach of float16 scales.
    """
    rows = np.require(weight.cpu().numpy(), requirements=["C", "W"])
    own = relative(None if masses is None else masses.cpu().double().numpy())
    try:
        found = fit_groups(rows, key_of(grid, bits), rows.shape[1] // groups, own, threads)
    except ValueError as error:
        raise WeightError(f"{error}; exclude the weight, or choose --grid free") from None
    codes, table = torch.from_numpy(found.codes), torch.from_numpy(table_of(found))
    return Fit(codes.to(weight.device), table.to(weight.device))


def luts_of(table: Tensor, grid: str, bits: int) -> Tensor:
    """LUTs float32 ``[rows, groups, 2**bits]`` of scales (and minima), in the order of levels."""
    return _luts(table, torch.from_numpy(levels(grid, bits)).to(table.device))


def _luts(table: Tensor, known: Tensor) -> Tensor:
    wide = table.float()
    lut = wide[..., :1] * known
    return lut + wide[..., 1:] if wide.shape[-1] > 1 else lut


class ShapedRows:
    """The search over a span of rows.

    Args:
        weight: float32 ``[rows, in]`` in the order of the factor.
        groups: int64 ``[in]``, group of each column, in the order of the factor.
        factor: of the damped Hessian.
        method: what to do.
        grid, bits: of the sketch.
    """

    def __init__(
        self, weight: Tensor, groups: Tensor, factor: Factor, method: Method, grid: str, bits: int
    ) -> None:
        self.weight, self.groups, self.factor, self.method = weight, groups, factor, method
        self._top = (1 << bits) - 1
        self._levels = torch.from_numpy(levels(grid, bits)).to(weight.device)
        # -128 is left alone, as in Q8_0: the search sees -127 twice.
        self._lowest = int(grid == "symmetric" and bits == 8)
        self._levels[0] = self._levels[self._lowest]

    def fit(self, starts: Sequence[Tensor], judge: Tensor | None) -> Fit:
        """Codes of the levels, and scales.

        Args:
            starts: scales to start from, float16 ``[rows, groups, fields]``; each row takes those
                with the least error on the calibration tokens.
            judge: held-out Hessian in the order of the factor, see `rows.fit_rows`.
        """
        best = found = self._best([self._rounded(table) for table in starts], self.factor.hessian)
        for _ in range(self.method.rounds):
            found = self.improve(found)
            best = found if judge is None else self._best((best, found), judge)
        codes = self._turned(best.codes, best.lut)
        return Fit(codes.clamp(min=self._lowest), best.lut)

    def improve(self, before: Fit) -> Fit:
        """One round: descent, refit, descent; the objective never rises but by rounding."""
        found = self._descended(before, self.method.sweeps)
        if self.method.refit_steps:
            found = self._best((found, self._refitted(found)), self.factor.hessian)
            found = self._descended(found, self.method.last_sweeps)
        return found

    def errors(self, fit: Fit, hessian: Tensor) -> Tensor:
        """``(w - q) H (w - q)'`` of each row: float64 ``[rows]``."""
        return errors(self.weight, Fit(fit.codes, self._ascending(fit.lut)), self.groups, hessian)

    def _rounded(self, table: Tensor) -> Fit:
        tables = self._tables(table)
        if self.method.compensate:
            return Fit(compensate(self.weight, self.factor.upper, tables), table)
        return Fit(encode(self.weight, tables), table)

    def _descended(self, before: Fit, sweeps: int) -> Fit:
        codes, tables = before.codes, self._tables(before.lut)
        gradient = self._gradient(codes, tables)
        for _ in range(sweeps):
            codes, gradient = descend(codes, gradient, self.factor.hessian, tables)
        return Fit(codes, before.lut)

    def _gradient(self, codes: Tensor, tables: Tables) -> Tensor:
        gap = self.weight - decode(codes, tables.lut, self.groups)
        return gap @ self.factor.hessian

    def _refitted(self, before: Fit) -> Fit:
        """Scales by least squares for the same levels, as float16; some rows may be worse off."""
        chosen = self._turned(before.codes, before.lut)
        gradient = self._gradient(before.codes, self._tables(before.lut))
        table = refit_scales(
            before.lut.float(), self._levels[chosen.long()], gradient, self.factor.hessian,
            self.groups, self.method.refit_steps,
        )  # fmt: skip
        limit = torch.finfo(torch.float16).max
        stored = table.clamp(-limit, limit).to(torch.float16)
        return Fit(self._turned(chosen, stored), stored)

    def _best(self, fits: Sequence[Fit], hessian: Tensor) -> Fit:
        """Of each row the fit with the least error, the first among equals."""
        best = fits[0]
        if len(fits) == 1:
            return best
        least = self.errors(best, hessian)
        for fit in fits[1:]:
            now = self.errors(fit, hessian)
            better = now < least
            codes = torch.where(better[:, None], fit.codes, best.codes)
            best = Fit(codes, torch.where(better[:, None, None], fit.lut, best.lut))
            least = torch.minimum(now, least)
        return best

    def _tables(self, table: Tensor) -> Tables:
        return make_tables(self._ascending(table), self.groups)

    def _ascending(self, table: Tensor) -> Tensor:
        lut = _luts(table, self._levels)
        return torch.where(table[..., :1] < 0, lut.flip(-1), lut)

    def _turned(self, codes: Tensor, table: Tensor) -> Tensor:
        """Codes from below to codes of levels, or back."""
        top = torch.tensor(self._top, dtype=torch.uint8, device=codes.device)
        return torch.where((table[..., 0] < 0)[:, self.groups], top - codes, codes)
