"""LUT entries refitted to their codes: least squares by conjugate gradients, all rows at once.

With the codes fixed, ``f(c) = (w - P c) H (w - P c)'`` is a quadratic in the entries c of a row (P
puts each entry in its columns). The normal matrix ``P' H P`` is never formed, which would take an
addition per pair of columns and row: a step needs one product with H, all groups of a row are
fitted together, and the gradient ``(W - Q) H`` that coordinate descent needs comes along.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sketchconv.kernels.tables import Tables, decode, entry_sums


def refit(
    codes: Tensor, gradient: Tensor, hessian: Tensor, tables: Tables, steps: int
) -> tuple[Tensor, Tensor]:
    """Entries that fit the codes better; each step lowers the objective, or leaves it.

    Entries that no column uses stay. Starts from the present entries; the preconditioner is the
    normal matrix of diag(H).

    Args:
        codes: uint8 ``[rows, columns]``.
        gradient: float32 ``[rows, columns]``, ``(W - Q) H``.
        hessian: float32 ``[columns, columns]``, symmetric, positive semidefinite.
        tables: LUTs of the rows; `groups` in the order of the columns.
        steps: products with the Hessian.

    Returns:
        float32 LUT ``[rows, groups, k]``, not sorted, and the gradient that belongs to it.
    """
    lut, gradient = tables.lut, gradient
    diagonal = hessian.diagonal().expand(codes.shape)
    mass = entry_sums(diagonal, codes, tables)
    inverse = torch.where(mass > 0, 1.0 / mass, torch.zeros_like(mass))
    residual = entry_sums(gradient, codes, tables)
    scaled = residual * inverse
    direction, power = scaled, _dot(residual, scaled)
    for step in range(steps):
        change = decode(codes, direction, tables.groups)
        bent = change @ hessian
        curvature = (change * bent).sum(1, dtype=torch.float64)
        length = torch.where(curvature > 0, power / curvature, 0.0).float()
        lut = lut + length[:, None, None] * direction
        gradient = gradient - length[:, None] * bent
        if step + 1 == steps:
            break
        residual = entry_sums(gradient, codes, tables)
        scaled = residual * inverse
        after = _dot(residual, scaled)
        turn = torch.where(power > 0, after / power, 0.0).float()
        direction, power = scaled + turn[:, None, None] * direction, after
    return lut, gradient


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).sum((1, 2))
