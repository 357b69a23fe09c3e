"""Asymmetric targets: the weight that gives the dense model's outputs from compressed inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sketchconv.calibration.spans import one_thread, spread

if TYPE_CHECKING:
    from torch import Tensor

    from sketchconv.calibration.factors import Factors


def target(
    weight: Tensor, factors: Factors, residual: Tensor | None, ridge: float,
    threads: int | None = None,
) -> Tensor:  # fmt: skip
    """``W* = W + (W C + Y) (H + lambda I)^-1``, lambda = ridge mean(diag H).

    It minimises ``||W X_dense + h_dense - h - W* X||^2 + lambda ||W* - W||^2`` over the tokens:
    with C and Y of `Statistics`, the layer also repairs the error of those before it.

    Args:
        weight: float32 ``[out, in]``.
        factors: of the layer's inputs.
        residual: Y, float32 ``[out, in]``.
        ridge: regularisation.
        threads: None: all cores; the result does not depend on it.

    Returns:
        float32 ``[out, in]``; the weight itself where neither C nor Y is known.
    """
    cross = factors.statistics.cross
    if cross is None and residual is None:
        return weight
    with one_thread(weight):
        inverse = factors.ridge_inverse(ridge)

    def work(begin: int, end: int) -> Tensor:
        part = weight[begin:end]
        pull = torch.zeros_like(part) if cross is None else part @ cross
        if residual is not None:
            pull = pull + residual[begin:end]
        return part + pull @ inverse

    return torch.cat(spread(work, weight, threads))
