"""How far each layer's output has moved from the reference's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class LayerErrors:
    """Relative errors ||h_model - h_reference|| / ||h_reference||, one per hidden state.

    Sums run over all tokens and channels that were added. A layer's error holds those of the
    layers before it: each model runs on its own hidden states.
    """

    def __init__(self) -> None:
        self._error: list[list[float]] = []
        self._norm: list[list[float]] = []

    def add(self, reference: Sequence[Tensor], states: Sequence[Tensor]) -> None:
        """Add the hidden states of one window, each [..., hidden], of both models.

        The last ones may be logits (`Network.states`), which are left out where their number of
        channels is not that of the others.
        """
        pairs = [
            (r, s)
            for r, s in zip(reference, states, strict=False)
            if r.shape == s.shape and r.shape[-1] == reference[0].shape[-1]
        ]
        self._error.append([_squared_norm(s.double().cpu() - r.double().cpu()) for r, s in pairs])
        self._norm.append([_squared_norm(r.double().cpu()) for r, _ in pairs])

    def values(self) -> tuple[float, ...]:
        """The errors: of the embeddings first, then of each layer."""
        errors = zip(*self._error, strict=True)
        norms = zip(*self._norm, strict=True)
        return tuple(
            math.sqrt(math.fsum(e) / total) if (total := math.fsum(n)) else 0.0
            for e, n in zip(errors, norms, strict=True)
        )


def _squared_norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values) ** 2)
