"""What an optimizer of LUTs looks at before it changes anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def finite(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether all gradients are finite, by their sums; parameters without one do not count."""
    sums = [p.grad.sum() for p in parameters if p.grad is not None]
    return not sums or bool(torch.isfinite(torch.stack([s.cpu() for s in sums])).all())
