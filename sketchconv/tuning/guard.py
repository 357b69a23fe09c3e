"""What an optimizer of LUTs looks at before it changes anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def finite(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether all gradients are finite, by their sums; parameters without one do not count."""
    sums = [p.grad.sum() for p in parameters if p.grad is not None]
    # Brought together where they are: a GPU is waited for once, not once per parameter.
    return not sums or bool(torch.isfinite(torch.stack([s.to(sums[0].device) for s in sums])).all())
