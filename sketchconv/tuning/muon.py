"""Muon over LUTs: a step that moves every direction of a layer's table by as much."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sketchconv.tuning.guard import finite
from sketchconv.tuning.masters import Master

MOMENTUM = 0.9
# Root mean square of a step's entries at a learning rate of 1, as Adam's is after some steps, so
# that one learning rate serves both (Liu et al., 2025, section 2.2).
SCALE = 0.2
# Widest table that is orthogonalised as a whole; of wider ones each group is by itself. The time of
# an eigendecomposition grows with the cube: 0.5 ms of 64 columns on one core, 8 ms of 256.
MOST_COLUMNS = 256
SMALLEST = 1e-12  # eigenvalues count as no smaller than this share of the largest

# No metric of the inputs is put between gradient and step: an experiment with them, 16 steps at
# 8e-3, gave a held-out perplexity of 39.7 without, 40.5 with the number of weights that share an
# entry, 41.6 with the second moment of its inputs, and 42.1 with a Gauss-Newton factor of each row
# from the four leading directions of the inputs, which have 20 to 80 % of their energy.


class LutMuon(Optimizer):
    """Muon over LUTs, each layer's step a share of the mean absolute entry of its base.

    The LUT of a layer is a matrix of few columns: one row for each output, one column for each
    entry of each group. Its gradient over the tokens of a step lies mostly along few directions,
    and so does Adam's step, which is near the sign of the gradient. Here the averaged gradient
    ``M`` is replaced by its orthogonal factor ``M (M^T M)^{-1/2}``, in which all directions count
    alike. Muon takes it from a Newton-Schulz iteration; with so few columns an eigendecomposition
    of ``M^T M`` costs next to nothing and is exact. The norm of the gradient does not matter, so
    that clipping changes only how much a step counts in the average.

    One average is kept for each value, half the state of Adam. A step over SmolLM2's 10 M values
    takes one core 0.32 s, Adam's 0.10 s, gradients of 512 tokens 4 to 5 s. Figures of both are with
    `optimizer.DEFAULT_OPTIMIZER`; rates for 16 steps are 5e-3 to 8e-3, and 1.6e-2 is too much.

    Where a gradient is not finite nothing is changed, and `broken` becomes true.

    Args:
        masters: what is trained.
        lr: the root mean square of a step's entries is `SCALE * lr` times the mean absolute entry
            of the layer's LUT in the base; with `relative` false, `SCALE * lr`.
        momentum: share of the average that stays in a step (Nesterov's form of momentum).
        weight_decay: share of each entry that is taken away per step, times `lr`.

    Source: K. Jordan et al., Muon: an optimizer for hidden layers in neural networks (2024); J. Liu
    et al., Muon is scalable for LLM training (2025), for the scale of the step.
    """

    def __init__(
        self,
        masters: Sequence[Master],
        lr: float,
        *,
        relative: bool = True,
        momentum: float = MOMENTUM,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([master.parameter for master in masters], defaults)
        self.relative = relative
        self.broken = False
        self._units = [float(master.unit.mean()) for master in masters]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; nothing but `broken` changes where a gradient is not finite."""
        group: dict[str, Any] = self.param_groups[0]
        if not finite(group["params"]):
            self.broken = True
            return None
        for parameter, unit in zip(group["params"], self._units, strict=True):
            if parameter.grad is not None:
                self._move(parameter, group, unit if self.relative else 1.0)
        return None

    def _move(self, parameter: Tensor, group: dict[str, Any], unit: float) -> None:
        state, grad = self.state[parameter], parameter.grad
        if grad is None:
            return
        momentum, rate = group["momentum"], group["lr"]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average = state["momentum_buffer"].lerp_(grad, 1 - momentum)
        parameter.mul_(1 - rate * group["weight_decay"])
        parameter.add_(directions(grad.lerp(average, momentum)), alpha=-SCALE * rate * unit)


def directions(gradient: Tensor) -> Tensor:
    """The orthogonal factor of a LUT's gradient, its entries' root mean square 1.

    Args:
        gradient: float32 ``[rows, groups, entries]``, of one layer.

    Returns:
        The same shape. A gradient of lower rank than it could have gives smaller entries, one of
        zeros zeros.
    """
    rows, groups, entries = gradient.shape
    if groups * entries <= MOST_COLUMNS:
        return _scaled(gradient.reshape(rows, -1)).view(gradient.shape)
    return _scaled(gradient.transpose(0, 1)).transpose(0, 1)


def _scaled(matrix: Tensor) -> Tensor:
    """Of ``[..., m, n]``: an orthogonal factor has a root mean square of 1 / sqrt(max(m, n))."""
    return orthogonal(matrix).mul_(math.sqrt(max(matrix.shape[-2:])))


def orthogonal(matrix: Tensor) -> Tensor:
    """``U V^T`` of the singular value decomposition ``U S V^T`` of float32 ``[..., m, n]``.

    Through the eigenvalues of the smaller of ``A^T A`` and ``A A^T``, in float64 on the CPU: those
    below 1e-12 of the largest count as that, so that noise is not made as large as the rest.
    """
    if matrix.shape[-2] < matrix.shape[-1]:
        return orthogonal(matrix.mT).mT
    wide = matrix.double()  # in float32 the square would hide values below 1e-4 of the largest
    values, vectors = torch.linalg.eigh((wide.mT @ wide).cpu())
    least = (values[..., -1:] * SMALLEST).clamp(min=torch.finfo(torch.float64).tiny)
    root = values.clamp(min=least).rsqrt()
    inverse: Tensor = (vectors * root[..., None, :]) @ vectors.mT
    factor: Tensor = wide @ inverse.to(wide.device)
    return factor.to(matrix.dtype)
