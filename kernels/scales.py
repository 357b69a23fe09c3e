"""Scales and minima refitted to their codes: least squares by conjugate gradients, all at once.

With the levels v of all columns fixed, ``q = s v + m`` is linear in the scale s and the minimum m
of each group, and ``(w - q) H (w - q)'`` a quadratic in all of a row's. As in `refit`, the normal
matrix is never formed: a step needs one product with H. The preconditioner is the normal matrix of
diag(H): one number per group, or 2 x 2 with minima, which depend on scales where levels have one
sign.
"""

from __future__ import annotations

import torch
from torch import Tensor

CONVERGED = 1e-10  # part of the first residual's square, below which float32 leads astray
SINGULAR = 1e-6  # a determinant below this part of the product of the diagonal is rounding


def refit_scales(
    table: Tensor, chosen: Tensor, gradient: Tensor, hessian: Tensor, groups: Tensor, steps: int
) -> Tensor:
    """Scales (and minima) that fit the levels better; each step lowers the objective or leaves it.

    Args:
        table: float32 ``[rows, groups, fields]``: scales, and behind them minima (2 fields).
        chosen: float32 ``[rows, columns]``, the level of each weight.
        gradient: float32 ``[rows, columns]``, ``(W - Q) H``.
        hessian: float32 ``[columns, columns]``, symmetric, positive semidefinite.
        groups: int64 ``[columns]``, the group of each column.
        steps: products with the Hessian.

    Returns:
        float32, shaped as `table`.
    """
    member = chosen.new_zeros(groups.numel(), table.shape[1])
    member[torch.arange(groups.numel(), device=groups.device), groups] = 1.0
    fields = table.shape[2]

    def gather(values: Tensor) -> Tensor:
        sums = [(values * chosen) @ member, values @ member]
        return torch.stack(sums[:fields], -1)

    def spread(change: Tensor) -> Tensor:
        moved = chosen * change[..., 0][:, groups]
        return moved if fields == 1 else moved + change[..., 1][:, groups]

    inverse = _Preconditioner(chosen, hessian.diagonal(), member, fields)
    residual = gather(gradient)
    scaled = inverse(residual)
    direction, power = scaled, _dot(residual, scaled)
    least = power * CONVERGED
    for step in range(steps):
        change = spread(direction)
        bent = change @ hessian
        curvature = (change * bent).sum(1, dtype=torch.float64)
        going = (curvature > 0) & (power > least)
        length = torch.where(going, power / curvature, 0.0).float()
        table = table + length[:, None, None] * direction
        if step + 1 == steps:
            break
        gradient = gradient - length[:, None] * bent
        residual = gather(gradient)
        scaled = inverse(residual)
        after = _dot(residual, scaled)
        turn = torch.where(power > 0, after / power, 0.0).float()
        direction, power = scaled + turn[:, None, None] * direction, after
    return table


class _Preconditioner:
    """Solves the normal equations of diag(H), group by group; what is singular stays as it is."""

    def __init__(self, chosen: Tensor, diagonal: Tensor, member: Tensor, fields: int) -> None:
        self.fields = fields
        self.a = (chosen.square() * diagonal) @ member
        if fields == 2:
            self.b = (chosen * diagonal) @ member
            self.c = (diagonal @ member).expand_as(self.a)
            self.determinant = self.a * self.c - self.b * self.b
            self.fine = self.determinant > self.a * self.c * SINGULAR

    def __call__(self, residual: Tensor) -> Tensor:
        p = residual[..., 0]
        if self.fields == 1:
            return _quotient(p, self.a)[..., None]
        q = residual[..., 1]
        u = _quotient(self.c * p - self.b * q, self.determinant)
        v = _quotient(self.a * q - self.b * p, self.determinant)
        # All levels equal: the minimum alone can take the change.
        alone = _quotient(q, self.c)
        zero = torch.zeros_like(u)
        pair = torch.where(self.fine, u, zero), torch.where(self.fine, v, alone)
        return torch.stack(pair, -1)


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / torch.where(b > 0, b, 1.0), 0.0)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).sum((1, 2))
