"""Scores of tokens, and the figures that sum them up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What one window's predictions are worth, each float64 [predictions] on the CPU, in nats.

    Args:
        loss: minus the log-probability of the token that came.
        divergence: KL(reference || model) over the whole vocabulary; None without a reference.
        agreement: 1 where both find the same token most likely; None without a reference.
        reference_loss: the reference's own loss; None without a reference.
    """

    loss: Tensor
    divergence: Tensor | None = None
    agreement: Tensor | None = None
    reference_loss: Tensor | None = None


def score(logits: Tensor, targets: Tensor, reference: Tensor | None = None) -> TokenScores:
    """Score predictions, on the device where their logits are.

    Args:
        logits: float32 [n, vocabulary].
        targets: the tokens that came, int64 [n].
        reference: the reference model's logits, as `logits`.
    """
    log_q = torch.log_softmax(logits, -1)
    loss = _loss(log_q, targets)
    if reference is None:
        return TokenScores(loss)
    log_p = torch.log_softmax(reference, -1)
    p = log_p.exp()
    # Terms of a token that the reference excludes (probability 0) are 0, not NaN.
    divergence = (p * torch.where(p == 0, 0.0, log_p - log_q)).sum(-1, dtype=torch.float64)
    agreement = (logits.argmax(-1) == reference.argmax(-1)).double().cpu()
    return TokenScores(loss, divergence.cpu(), agreement, _loss(log_p, targets))


def _loss(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    return -log_probabilities.gather(1, targets.unsqueeze(1)).squeeze(1).double().cpu()


def joined(parts: Sequence[TokenScores]) -> TokenScores:
    """Scores one after the other."""

    def column(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    loss = torch.cat([part.loss for part in parts])
    return TokenScores(loss, column("divergence"), column("agreement"), column("reference_loss"))


@dataclass(frozen=True, slots=True)
class Spread:
    """A mean over tokens, and how far to trust it.

    Args:
        mean: over all tokens.
        error: standard error of the mean from the windows' means; None for one window.
    """

    mean: float
    error: float | None

    @classmethod
    def of(cls, windows: Sequence[Tensor]) -> Spread:
        """The spread of per-token values, one tensor [predictions] per window."""
        mean = torch.cat(list(windows)).mean().item()
        if len(windows) < 2:
            return cls(mean, None)
        means = torch.stack([window.mean() for window in windows])
        return cls(mean, means.std().item() / math.sqrt(len(windows)))


@dataclass(frozen=True, slots=True)
class Divergence:
    """KL(reference || model) per token, in nats, and how often both prefer the same token."""

    kl: Spread
    median: float
    p99: float
    agreement: Spread


@dataclass(frozen=True, slots=True)
class TextScore:
    """A model on one text.

    Args:
        text: name of the text.
        windows: number of windows.
        tokens: number of predictions that counted.
        perplexity: exp of the mean loss.
        loss: minus the mean log-probability per token, in nats.
        divergence: from the reference; None without one.
    """

    text: str
    windows: int
    tokens: int
    perplexity: float
    loss: Spread
    divergence: Divergence | None

    @classmethod
    def of(cls, text: str, windows: Sequence[TokenScores]) -> TextScore:
        """Sum up the scores of a text's windows."""
        loss = Spread.of([window.loss for window in windows])
        try:
            perplexity = math.exp(loss.mean)
        except OverflowError:
            perplexity = math.inf
        tokens = sum(window.loss.shape[0] for window in windows)
        return cls(text, len(windows), tokens, perplexity, loss, _divergence(windows))

    @classmethod
    def of_reference(cls, text: str, windows: Sequence[TokenScores]) -> TextScore:
        """The reference's own figures, from the same windows."""
        losses = [w.reference_loss for w in windows if w.reference_loss is not None]
        return cls.of(text, [TokenScores(loss) for loss in losses])


def _divergence(windows: Sequence[TokenScores]) -> Divergence | None:
    values = [w.divergence for w in windows if w.divergence is not None]
    same = [w.agreement for w in windows if w.agreement is not None]
    if not values:
        return None
    every = torch.cat(values).sort().values
    return Divergence(
        Spread.of(values), _quantile(every, 0.5), _quantile(every, 0.99), Spread.of(same)
    )


def _quantile(ascending: Tensor, share: float) -> float:
    """A quantile between neighbours; `torch.quantile` refuses more than 2**24 values."""
    place = share * (ascending.shape[0] - 1)
    low = math.floor(place)
    high = min(low + 1, ascending.shape[0] - 1)
    value = ascending[low] + (place - low) * (ascending[high] - ascending[low])
    return float(value)
