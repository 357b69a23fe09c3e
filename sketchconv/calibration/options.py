"""What a user decides about a calibrated conversion."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sketchconv.calibration.methods import DEFAULT_METHOD
from sketchconv.errors import RecipeError

if TYPE_CHECKING:
    from sketchconv.plan import Step

SELF = "self"
RECOVER_BY = ("auto", "model", "blocks")
MAX_RECOVERED_BITS = 3
# SmolLM2-135M at 3 bits, KL to the dense model on WikiText-2's test split: 0.234 gathered from
# 16,384 tokens of the validation split, 0.192 from 65,536 and 0.181 from 131,072; from 65,536 and
# then recovered on 16,384 tokens 0.185, on 32,768 0.180 and on 65,536 0.176.
DEFAULT_TOKENS = 65_536
DEFAULT_SEQ_LEN = 1024
DEFAULT_RECOVERY_TOKENS = 32_768


@dataclass(frozen=True, slots=True)
class Calibration:
    """How a conversion is calibrated.

    Args:
        text: a ``.txt`` or ``.jsonl`` file, ``"self"`` for text that the model writes itself, a
            data set's id on the Hub, or several of these, which then give equal shares; None only
            for methods that need no data.
        tokens: tokens whose activations are gathered, rounded up to whole windows; None takes
            65,536, or fewer where the texts have no more.
        seq_len: tokens per window; None takes 1024, or as many as the model is made for.
        seed: decides which windows of the text are taken, and what the model writes.
        method: name of a method, see `sketchconv.calibration.methods`.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:n``.
        recover: tokens that the recovery trains on, 0 for none; None decides by the plan's bits.
        recover_by: ``model`` trains the whole model on the dense model's predictions, ``blocks``
            each block on the dense block's outputs; ``auto`` the model where it fits in memory.
    """

    text: str | Path | tuple[str | Path, ...] | None = None
    tokens: int | None = None
    seq_len: int | None = None
    seed: int = 0
    method: str = "sketch"
    device: str = "auto"
    recover: int | None = None
    recover_by: str = "auto"

    def __post_init__(self) -> None:
        for field, low in (("tokens", 1), ("seq_len", 2), ("seed", 0)):
            value = getattr(self, field)
            if value is None and field != "seed":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise RecipeError(
                    f"calibration: {field} must be an integer of at least {low}, got {value!r}"
                )
        if self.recover_by not in RECOVER_BY:
            raise RecipeError(
                f"calibration: recover_by must be one of {', '.join(RECOVER_BY)}, "
                f"got {self.recover_by!r}"
            )
        if self.recover is not None and self.recover < 0:
            raise RecipeError(f"calibration: recover must not be negative, got {self.recover}")

    @property
    def texts(self) -> tuple[str, ...]:
        """Every text, as it was named."""
        if self.text is None:
            return ()
        several = self.text if isinstance(self.text, tuple) else (self.text,)
        return tuple(str(text) for text in several)

    @property
    def length(self) -> int:
        """Tokens per window, once `within` has seen the model."""
        return self.seq_len or DEFAULT_SEQ_LEN

    def within(self, longest: int | None) -> Calibration:
        """The same with the windows' length decided; one that was asked for stays as it is.

        Args:
            longest: tokens of the longest text that the model is made for; None: no limit.
        """
        fitting = DEFAULT_SEQ_LEN if longest is None else min(DEFAULT_SEQ_LEN, longest)
        return dataclasses.replace(self, seq_len=self.seq_len or fitting)

    @property
    def windows(self) -> int:
        """Windows whose activations are gathered: so many, or without `tokens` at most."""
        return -(-(self.tokens or DEFAULT_TOKENS) // self.length)

    def recovery_tokens(self, steps: Iterable[Step]) -> int:
        """Tokens to recover on: as asked for, or by default some at 3 bits and below.

        Args:
            steps: of the plan. Where bits differ, most of the linear weights must be so coarse.
        """
        if self.recover is not None:
            return self.recover
        ours = self.texts and self.method == DEFAULT_METHOD  # published recipes stay as they are
        return DEFAULT_RECOVERY_TOKENS if ours and _mostly_coarse(steps) else 0

    def to_json(self) -> dict[str, Any]:
        """Plain values for the sketch's document; files by name only, never by path."""
        tokens = self.windows * self.length if self.texts else 0
        return {
            "method": self.method,
            "texts": [Path(text).name if Path(text).suffix else text for text in self.texts],
            "tokens": tokens if self.tokens is not None else f"at most {tokens}",
            "seq_len": self.length,
            "seed": self.seed,
        }


def _mostly_coarse(steps: Iterable[Step]) -> bool:
    """Whether most of the linear parameters that are sketched have few enough bits."""
    weights = [(s.parameters, s.record.bits) for s in steps if s.role == "linear" and s.record]
    coarse = sum(count for count, bits in weights if bits <= MAX_RECOVERED_BITS)
    return 2 * coarse > sum(count for count, _ in weights)
