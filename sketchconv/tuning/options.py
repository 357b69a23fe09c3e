"""What a tuning is asked for, and what it reports."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sketchconv.errors import TuningError
from sketchconv.tuning.optimizer import DEFAULT_OPTIMIZER, EPSILON, OPTIMIZERS, OptimizerName
from sketchconv.tuning.prepare import DEFAULT_GRADIENT, GRADIENTS, Gradient

# As a share of a LUT's size, 0.21 on average in SmolLM2: the paper's largest rate, 1e-4 in units of
# the weights, is 5e-4 here. Best for SmolLM2 at 4 bits, G = 4, steps of 1,024 tokens of WikiText-2:
# 4e-3 for 128 steps and 1.4e-3 to 2e-3 for 480; 5.6e-3 at 3 bits and 1.1e-2 at 2 bits for 128. Half
# of the best rate costs up to 3 % of the perplexity, twice of it 3 to 8 %.
LEARNING_RATE = 2e-3
Schedule = Literal["linear", "cosine"]
SCHEDULES = ("linear", "cosine")
MOST_SEED = 2**32 - 1  # of NumPy, which transformers seeds too
# Linear was better than cosine at every shape, for LUTs and for LoRA: 128 steps of 1,024 tokens at
# the best rate of each, G = 1, 2, 4, 8 at 4 bits, and G = 4 at 3 and 2 bits, test perplexity 17.16,
# 16.88, 16.66, 16.50, 19.55 and 32.93 instead of 17.32, 16.98, 16.81, 16.62, 19.71 and 34.07
# (tests/bench/adaptation.jsonl).
DEFAULT_SCHEDULE: Schedule = "linear"


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """How the LUTs of a sketch are tuned.

    Args:
        learning_rate: the largest step of a LUT entry, as a share of its group's mean absolute
            entry; with `relative` false, in units of the weights, as in the paper.
        relative: see `learning_rate`.
        optimizer: "adamw", or "muon", which keeps half the state.
        gradient: "mean" or "sum" over the weights that share an entry.
        batch_size: rows per forward pass and process.
        gradient_accumulation: forward passes per step.
        max_steps: stop after so many steps; None takes what `epochs` need.
        epochs: passes over the data.
        warmup: steps over which the learning rate rises, or below 1 their share; then it falls.
        schedule: how it falls to 0: "linear", or "cosine".
        seq_len: most tokens of a row.
        packing: put several short samples into a row, none of which sees another.
        eval_share: share of the samples that is held out, where there is no data set for it.
        most_eval_tokens: of the held-out samples.
        eval_steps: measure them every so many steps; None: ten times in all.
        patience: stop after so many measurements without a new best; 0 never does.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them.
        epsilon: of AdamW.
        embeddings: train sketched embeddings too (and a head tied to them).
        head: train a sketched head too.
        activation_checkpointing: compute activations again in the backward pass, in less memory.
        bf16: compute in bfloat16; None does where the hardware multiplies it.
        device: "auto", "cpu" or "cuda".
        seed: of the order of the samples, of what is held out, and of dropout.
    """

    learning_rate: float = LEARNING_RATE
    relative: bool = True
    optimizer: OptimizerName = DEFAULT_OPTIMIZER
    gradient: Gradient = DEFAULT_GRADIENT
    batch_size: int = 4
    gradient_accumulation: int = 1
    max_steps: int | None = None
    epochs: float = 3.0
    warmup: float = 0.05
    schedule: Schedule = DEFAULT_SCHEDULE
    seq_len: int = 512
    packing: bool = True
    eval_share: float = 0.05
    most_eval_tokens: int = 16384
    eval_steps: int | None = None
    patience: int = 3
    max_grad_norm: float = 1.0
    epsilon: float = EPSILON
    embeddings: bool = False
    head: bool = False
    activation_checkpointing: bool = False
    bf16: bool | None = None
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        _check("learning_rate", self.learning_rate, 0.0, 1.0)
        for field in ("batch_size", "gradient_accumulation", "max_steps", "eval_steps"):
            _check(field, getattr(self, field), 1, None)
        _check("epochs", self.epochs, 0.001, None)
        _check("warmup", self.warmup, 0, None)
        _check("seq_len", self.seq_len, 2, None)
        _check("eval_share", self.eval_share, 0.0, 0.9)
        _check("most_eval_tokens", self.most_eval_tokens, 1, None)
        for field in ("patience", "max_grad_norm", "epsilon"):
            _check(field, getattr(self, field), 0, None)
        _check("seed", self.seed, 0, MOST_SEED)
        if self.gradient not in GRADIENTS:
            raise TuningError(f"gradient must be mean or sum, got {self.gradient!r}")
        if self.optimizer not in OPTIMIZERS:
            known = " or ".join(OPTIMIZERS)
            raise TuningError(f"optimizer must be {known}, got {self.optimizer!r}")
        if self.schedule not in SCHEDULES:
            known = " or ".join(SCHEDULES)
            raise TuningError(f"schedule must be {known}, got {self.schedule!r}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise TuningError(f"device must be auto, cpu or cuda, got {self.device!r}")

    def to_json(self) -> dict[str, Any]:
        """All fields, plain."""
        return asdict(self)


def _check(field: str, value: float | None, low: float, high: float | None) -> None:
    if value is None:
        return
    if not (math.isfinite(value) and value >= low) or (high is not None and value > high):
        most = "" if high is None else f" and at most {high}"
        raise TuningError(f"{field} must be at least {low}{most}, got {value}")


@dataclass(frozen=True, slots=True)
class TuneStep:
    """One event of a tuning: a step, or a measurement of the held-out samples.

    `loss` is the mean over the step's learned tokens, in nats; `eval_loss` that of the held-out
    tokens, with LUTs rounded as they would be shipped. One of them is None. Step 0 is the base.
    """

    step: int
    steps: int
    loss: float | None
    eval_loss: float | None
    learning_rate: float | None
    seconds: float


ProgressCallback = Callable[[TuneStep], None]


@dataclass(frozen=True, slots=True)
class Tuning:
    """What a tuning did.

    Args:
        output: the delta that was written.
        output_bytes: its size.
        steps: steps that were made, those before a resumption included.
        best_step: the one whose LUTs were written.
        loss_before: held-out loss of the base, in nats per learned token.
        loss_after: of what was written.
        trained: values that were trained.
        rows, learned: rows of the training data, and learned tokens in one pass over them.
        eval_learned: held-out learned tokens.
        seconds: wall time of this run.
        notes: what is worth knowing: samples left out, an early stop, a loss that did not fall.
        curve: all events, in order.
    """

    output: str
    output_bytes: int
    steps: int
    best_step: int
    loss_before: float
    loss_after: float
    trained: int
    rows: int
    learned: int
    eval_learned: int
    seconds: float
    notes: tuple[str, ...] = ()
    curve: tuple[TuneStep, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All fields, plain, with perplexities."""
        return {
            **asdict(self),
            "perplexity_before": _exp(self.loss_before),
            "perplexity_after": _exp(self.loss_after),
        }


def _exp(loss: float) -> float | None:
    return math.exp(loss) if loss < 700 else None
