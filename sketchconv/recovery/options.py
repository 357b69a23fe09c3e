"""What recovery is asked for, and what it reports."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from sketchconv.errors import SketchconvError

# By bits of a LUT's index (coarser LUTs are farther from where they should be), for steps of
# `RATED_TOKENS`; for others in proportion to the root of their tokens, as the noise of a gradient
# falls. SmolLM2-135M at 3 bits, 8,192 tokens: steps of 256, 512 and 1024 tokens took the held-out
# divergence from 0.412 to 0.294, 0.303 and 0.308. The better the start, the smaller the step:
# 65,536 tokens after a calibration on as many took the divergence on other text from 0.192 to
# 0.172 with 7.5e-4 and to 0.176 with 1.5e-3; at 2 bits from 0.630 to 0.497 with 2.5e-3 and to 0.528
# with 7.5e-4; at 4 bits from 0.0489 to 0.0479 with 3e-4, while 7.5e-4 and more made it worse.
LEARNING_RATES = {1: 2.5e-3, 2: 2.5e-3, 3: 1e-3}
FINE_LEARNING_RATE = 3e-4
RATED_TOKENS = 256


class RecoveryError(SketchconvError):
    """Recovery cannot be run on this model or with these inputs; the model is as it was."""


@dataclass(frozen=True, slots=True)
class RecoveryOptions:
    """How LUTs are trained.

    Args:
        learning_rate: step of Adam as a share of a LUT's mean absolute entry; None takes
            `LEARNING_RATES` by the bits of each weight and the tokens of a step.
        tokens: how many tokens to train on, counting a token again each time it is seen; None
            passes once over the windows that are not held out.
        step_tokens: tokens per step; at least one window.
        betas: decays of Adam's averages.
        warmup: first steps, over which the learning rate rises; then it falls linearly to 0.
        seed: of the order of the windows.
        held_out: share of the windows, from the end, that is not trained on but measured (at least
            one, at most `most_held_out` tokens).
        most_held_out: tokens.
        checks: how often the held-out windows are measured during training; the best LUTs are kept.
        cache_weights: keep every trained weight decoded for the length of a step (2 bytes per
            weight in bfloat16); None does where `room.weights_fit` says so.
        max_memory: limit on the memory of the process in bytes, for that decision.
    """

    learning_rate: float | None = None
    tokens: int | None = None
    step_tokens: int = 256
    betas: tuple[float, float] = (0.9, 0.95)
    warmup: int = 3
    seed: int = 0
    held_out: float = 0.125
    most_held_out: int = 4096
    checks: int = 2
    cache_weights: bool | None = None
    max_memory: int | None = None

    def __post_init__(self) -> None:
        _check("learning_rate", self.learning_rate, 0.0, 1.0)
        _check("tokens", self.tokens, 1, None)
        _check("step_tokens", self.step_tokens, 1, None)
        _check("warmup", self.warmup, 0, None)
        _check("held_out", self.held_out, 0.0, 0.9)
        _check("most_held_out", self.most_held_out, 1, None)
        _check("checks", self.checks, 1, None)
        _check("max_memory", self.max_memory, 1, None)
        for beta in self.betas:
            _check("betas", beta, 0.0, 0.9999)

    def rate(self, bits: int, tokens: int) -> float:
        """The learning rate of LUTs with ``2**bits`` entries, for steps of so many tokens."""
        if self.learning_rate is not None:
            return self.learning_rate
        rate = LEARNING_RATES.get(bits, FINE_LEARNING_RATE)
        return rate * math.sqrt(tokens / RATED_TOKENS)


def _check(field: str, value: float | None, low: float, high: float | None) -> None:
    if value is None:
        return
    if not value >= low or (high is not None and value > high):
        most = "" if high is None else f" and at most {high}"
        raise RecoveryError(f"recovery: {field} must be at least {low}{most}, got {value}")


@dataclass(frozen=True, slots=True)
class RecoveryStep:
    """One event of a recovery: after each step of training.

    `loss` is the mean over the step's tokens; `held_out` that of the held-out tokens where they
    were just measured.
    """

    step: int
    steps: int
    loss: float
    held_out: float | None
    seconds: float


ProgressCallback = Callable[[RecoveryStep], None]


@dataclass(frozen=True, slots=True)
class Recovery:
    """What a recovery did.

    Args:
        steps: steps of training that were made.
        kl_before: mean over the held-out tokens of KL(dense || model), in nats, before.
        kl_after: the same for the LUTs that the model has now, rounded to their dtype.
        kept: whether trained LUTs were kept; else the model is, byte for byte, as it was.
        seconds: wall time.
        tokens: trained on, repeats counted.
        held_out_tokens: measured.
        measure: ``"kl"``; ``"error"`` for a model without a head, for which both figures are the
            relative squared error of the final hidden states.
        note: why training stopped early or nothing was kept, in words; else empty.
    """

    steps: int
    kl_before: float
    kl_after: float
    kept: bool
    seconds: float
    tokens: int
    held_out_tokens: int = 0
    measure: str = "kl"
    note: str = ""
