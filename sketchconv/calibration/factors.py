"""Factors of a damped Hessian, kept for all the weights that share their inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from sketchconv.calibration.statistics import StatisticsError

if TYPE_CHECKING:
    from torch import Tensor

    from sketchconv.calibration.statistics import Statistics

MORE_DAMPING = 10.0
ATTEMPTS = 6
FIRST_DAMPING = 1e-4
MOST_DOUBLE = 4096  # columns; beyond, factors are float32 where that will do, in half the time


@dataclass(frozen=True, slots=True)
class Factor:
    """A damped Hessian with its columns in the order in which they are rounded.

    Attributes:
        order: int64 ``[in]``: position j holds original column ``order[j]``.
        hessian: float32 ``[in, in]``, damped, in that order.
        upper: float32 ``[in, in]``, U upper triangular with ``hessian^-1 = U' U``.
        damping: what was added to the diagonal, as a part of its mean.
        dead: columns whose input is always zero.
    """

    order: Tensor
    hessian: Tensor
    upper: Tensor
    damping: float
    dead: int


@dataclass
class Factors:
    """The factors of one layer's inputs; each is computed once, but for the inverse of a target.

    Weights with the same inputs (query, key and value; gate and up) should share one.
    """

    statistics: Statistics
    _known: dict[tuple[float, bool], Factor] = field(default_factory=dict)

    def factor(self, damping: float, *, act_order: bool) -> Factor:
        """The factor for a damping; more damping where the Hessian cannot be factored with it.

        Raises:
            StatisticsError: no damping helps.
        """
        key = (damping, act_order)
        if key not in self._known:
            self._known[key] = _factor(self.statistics.hessian, damping, act_order)
        return self._known[key]

    def keep_only(self, damping: float) -> None:
        """Forget the factors of every other damping."""
        self._known = {key: value for key, value in self._known.items() if key[0] == damping}

    def ridge_inverse(self, ridge: float) -> Tensor:
        """``(H + ridge mean(diag H) I)^-1``, float32 ``[in, in]``."""
        matrix, _ = damped(self.statistics.hessian, ridge)
        return torch.cholesky_inverse(_cholesky(matrix)).float()


def damped(hessian: Tensor, damping: float) -> tuple[Tensor, int]:
    """``H + damping mean(diag H) I`` in float32, and the number of dead columns.

    A column whose input is always zero has nothing but the damping on its diagonal: it takes part
    with the least weight, and nothing is compensated into or out of it. If all are dead the
    identity takes the place of the Hessian.
    """
    diagonal = hessian.diagonal().double()
    dead = int((diagonal <= 0).sum())
    mean = float(diagonal.clamp(min=0).mean())
    matrix = hessian.clone()
    if mean <= 0:
        matrix.zero_()
        mean, damping = 1.0, 1.0
    matrix.diagonal().add_(damping * mean)
    return matrix, dead


def _factor(hessian: Tensor, damping: float, act_order: bool) -> Factor:
    diagonal = hessian.diagonal()
    if act_order:
        order = diagonal.argsort(descending=True, stable=True)
    else:
        order = torch.arange(diagonal.numel(), device=diagonal.device)
    used = damping
    for _ in range(ATTEMPTS):
        matrix, dead = damped(hessian[order][:, order], used)
        upper = _inverse_upper(matrix)
        if upper is not None:
            return Factor(order, matrix, upper, used, dead)
        used = max(used * MORE_DAMPING, FIRST_DAMPING)
    raise StatisticsError(
        f"hessian: not positive definite even with {used / MORE_DAMPING:g} times the mean of its "
        "diagonal added; it is not the second moments of any inputs"
    )


def _inverse_upper(matrix: Tensor) -> Tensor | None:
    """U with ``matrix^-1 = U' U``, or None where the matrix is not positive definite.

    With the columns backwards the matrix is ``L L'``; forwards again, L is upper triangular and its
    inverse is U. One Cholesky and one triangular inverse instead of two and an inverse.
    """
    found = _cholesky_or_none(matrix.flip(0, 1))
    if found is None:
        return None
    found = found.flip(0, 1)  # under the same name: a calibration's memory peaks here
    eye = torch.eye(matrix.shape[0], dtype=found.dtype, device=matrix.device)
    upper: Tensor = torch.linalg.solve_triangular(found, eye, upper=True)
    return upper.float()


def _cholesky_or_none(matrix: Tensor) -> Tensor | None:
    """Lower factor in float64, or in float32 for a large matrix that has one."""
    factor: Tensor
    if matrix.shape[0] > MOST_DOUBLE:
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info) == 0:
            return factor
    factor, info = torch.linalg.cholesky_ex(matrix.double())
    return factor if int(info) == 0 else None


def _cholesky(matrix: Tensor) -> Tensor:
    factor = _cholesky_or_none(matrix)
    if factor is None:
        raise StatisticsError("hessian: not positive definite with the ridge of the target")
    return factor
