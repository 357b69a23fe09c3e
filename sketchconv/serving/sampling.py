"""The next token of one answer."""

from __future__ import annotations

import torch
from torch import Tensor

from sketchconv.serving.wanted import Sampling


def source(sampling: Sampling) -> torch.Generator:
    """The random numbers of one answer: the same for the same seed, whoever else is served."""
    made = torch.Generator()
    if sampling.seed is None:
        made.seed()
    else:
        made.manual_seed(sampling.seed % 2**63)
    return made


def pick(logits: Tensor, sampling: Sampling, random: torch.Generator) -> int:
    """A token by its logits ``[vocabulary]``."""
    logits = logits.float().cpu()
    if sampling.temperature == 0:
        return int(logits.argmax())
    chances = (logits / max(sampling.temperature, 1e-4)).softmax(-1)
    if sampling.top_p < 1:
        ordered, places = chances.sort(descending=True)
        # A token is out if those before it have the wanted probability together already.
        ordered[ordered.cumsum(-1) - ordered >= sampling.top_p] = 0
        return int(places[torch.multinomial(ordered, 1, generator=random)])
    return int(torch.multinomial(chances, 1, generator=random))
