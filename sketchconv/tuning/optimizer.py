"""The optimizers of LUTs, and AdamW with steps in units of the LUT that they change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from sketchconv.errors import TuningError
from sketchconv.tuning.guard import finite
from sketchconv.tuning.masters import Master, training_of
from sketchconv.tuning.muon import LutMuon

OptimizerName = Literal["adamw", "muon"]
OPTIMIZERS = ("adamw", "muon")
# Neither is better for all lengths. SmolLM2, 4 bits, G = 4, steps of 512 tokens of WikiText-2, test
# (held-out) perplexity: 16 steps 24.54 (41.68) with AdamW and 24.25 (40.98) with Muon, 32 steps
# 22.83 (35.67) and 23.03 (35.25), at 4e-3 and 5e-3. LoRA with as many values: 23.75 (39.70) and
# 22.17 (34.01). Steps of 1,024 tokens, 128 of them: 15.76 with AdamW, 16.04 with Muon.
DEFAULT_OPTIMIZER: OptimizerName = "adamw"
BETAS = (0.9, 0.999)
# Below all gradients: means over a bucket are about 3e-5 in SmolLM2, 0.02 % of them below 1e-8,
# and the larger the model and the step, the smaller they are.
EPSILON = 1e-12
# Of SmolLM2, 4 bits, G = 4, after 64 steps of 512 tokens: test (held-out) perplexity 22.12 (28.43)
# instead of 22.14 (28.57); after 128 of 1,024: see tests/bench/adaptation.jsonl.
CAUTIOUS = True
LEAST_SHARE = 1e-3  # of entries that move: no step is stretched by more than a thousand


class LutAdamW(AdamW):
    """AdamW over LUTs, each entry's step a share of its group's mean absolute entry in the base.

    Adam's step does not depend on the size of the gradient, so that one learning rate would move a
    LUT of small weights by far more of its size than one of large weights. Where a gradient is not
    finite nothing is changed, and `broken` becomes true.

    Args:
        masters: what is trained.
        lr: about the largest step of an entry, as a share of its group's mean absolute entry; with
            `relative` false, in units of the weights.
        cautious: leave out entries whose averaged gradient points against this step's, and let the
            layer's other entries go as much farther.
        options: `betas`, `eps`, `weight_decay` as torch has them.

    Source: K. Liang et al., Cautious Optimizers: improving training with one line of code (2024).
    """

    def __init__(
        self, masters: Sequence[Master], lr: float, *, relative: bool = True,
        cautious: bool = CAUTIOUS, **options: Any,
    ) -> None:  # fmt: skip
        given = {"betas": BETAS, "eps": EPSILON, "weight_decay": 0.0, **options}
        super().__init__([master.parameter for master in masters], lr=lr, **given)
        self.relative = relative
        self.cautious = cautious
        self.broken = False
        self._units = [master.unit for master in masters]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; nothing but `broken` changes where a gradient is not finite."""
        parameters = self.param_groups[0]["params"]
        if not finite(parameters):
            self.broken = True
            return None
        if not (self.relative or self.cautious):
            plain: float | None = super().step(closure)
            return plain
        before = [parameter.clone() for parameter in parameters]
        loss: float | None = super().step(closure)
        for parameter, former, unit in zip(parameters, before, self._units, strict=True):
            moved = parameter.sub_(former)
            if self.relative:
                moved.mul_(unit.to(parameter.device))
            if self.cautious and parameter.grad is not None:
                _without_opposed(moved, parameter.grad)
            moved.add_(former)
        return loss


def _without_opposed(moved: Tensor, gradient: Tensor) -> None:
    """Undo moves up the gradient, and stretch the others by their share of all that have one."""
    down = moved * gradient < 0
    share = down.sum() / torch.count_nonzero(gradient).clamp_(min=1)
    moved.mul_(down).div_(share.clamp_(min=LEAST_SHARE))


LutOptimizer = LutAdamW | LutMuon


def lut_optimizer(
    model: nn.Module,
    learning_rate: float,
    *,
    optimizer: OptimizerName = DEFAULT_OPTIMIZER,
    relative: bool = True,
    **options: Any,
) -> LutOptimizer:
    """The optimizer of a prepared model, for `Trainer(..., optimizers=(lut_optimizer(m), None))`.

    Args:
        model: from `prepare_for_lut_training`.
        learning_rate: see `LutMuon` and `LutAdamW`.
        optimizer: "adamw" or "muon".
        relative: steps as shares of the base's LUT entries, or in units of the weights.
        options: `momentum` of Muon, `betas` and `eps` of AdamW, `weight_decay` of both.

    Raises:
        TuningError: the model was not prepared, or there is no such optimizer.
    """
    masters = training_of(model).masters
    if optimizer == "muon":
        return LutMuon(masters, learning_rate, relative=relative, **options)
    if optimizer == "adamw":
        return LutAdamW(masters, learning_rate, relative=relative, **options)
    raise TuningError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
