"""AdamW whose steps are counted in units of the LUT that they change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

from sketchconv.tuning.masters import Master, training_of

BETAS = (0.9, 0.999)
# Below all gradients: means over a bucket are about 3e-5 in SmolLM2, 0.02 % of them below 1e-8,
# and the larger the model and the step, the smaller they are.
EPSILON = 1e-12


class LutAdamW(AdamW):
    """AdamW over LUTs, each entry's step a share of its group's mean absolute entry in the base.

    Adam's step does not depend on the size of the gradient, so that one learning rate would move a
    LUT of small weights by far more of its size than one of large weights. Where a gradient is not
    finite nothing is changed, and `broken` becomes true.

    Args:
        masters: what is trained.
        lr: the largest step of an entry, as a share of its group's mean absolute entry; with
            `relative` false, in units of the weights.
        options: `betas`, `eps`, `weight_decay` as torch has them.
    """

    def __init__(
        self, masters: Sequence[Master], lr: float, *, relative: bool = True, **options: Any
    ) -> None:
        given = {"betas": BETAS, "eps": EPSILON, "weight_decay": 0.0, **options}
        super().__init__([master.parameter for master in masters], lr=lr, **given)
        self.relative = relative
        self.broken = False
        self._units = [master.unit for master in masters]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; nothing but `broken` changes where a gradient is not finite."""
        parameters = self.param_groups[0]["params"]
        if not self._finite(parameters):
            self.broken = True
            return None
        if not self.relative:
            plain: float | None = super().step(closure)
            return plain
        before = [parameter.clone() for parameter in parameters]
        loss: float | None = super().step(closure)
        for parameter, former, unit in zip(parameters, before, self._units, strict=True):
            moved = parameter.sub_(former).mul_(unit.to(parameter.device))
            moved.add_(former)
        return loss

    @staticmethod
    def _finite(parameters: Sequence[nn.Parameter]) -> bool:
        sums = [p.grad.sum() for p in parameters if p.grad is not None]
        return not sums or bool(torch.isfinite(torch.stack([s.cpu() for s in sums])).all())


def lut_optimizer(
    model: nn.Module, learning_rate: float, *, relative: bool = True, **options: Any
) -> LutAdamW:
    """The optimizer of a prepared model, for `Trainer(..., optimizers=(lut_optimizer(m), None))`.

    Raises:
        TuningError: the model was not prepared.
    """
    return LutAdamW(training_of(model).masters, learning_rate, relative=relative, **options)
