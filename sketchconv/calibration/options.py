"""What a user decides about a calibrated conversion."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sketchconv.calibration.methods import DEFAULT_METHOD
from sketchconv.errors import RecipeError

SELF = "self"
MAX_RECOVERED_BITS = 3
DEFAULT_RECOVERY_TOKENS = 16_384


@dataclass(frozen=True, slots=True)
class Calibration:
    """How a conversion is calibrated.

    Args:
        text: a ``.txt`` or ``.jsonl`` file, ``"self"`` for text that the model writes itself, a
            data set's id on the Hub, or several of these, which then give equal shares; None only
            for methods that need no data.
        tokens: tokens whose activations are gathered, rounded up to whole windows.
        seq_len: tokens per window.
        seed: decides which windows of the text are taken, and what the model writes.
        method: name of a method, see `sketchconv.calibration.methods`.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:n``.
        recover: tokens that the recovery trains on, 0 for none; None decides by the bits.
    """

    text: str | Path | tuple[str | Path, ...] | None = None
    tokens: int = 16_384
    seq_len: int = 1024
    seed: int = 0
    method: str = "sketch"
    device: str = "auto"
    recover: int | None = None

    def __post_init__(self) -> None:
        for field, low in (("tokens", 1), ("seq_len", 2), ("seed", 0)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise RecipeError(
                    f"calibration: {field} must be an integer of at least {low}, got {value!r}"
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
    def windows(self) -> int:
        """Windows whose activations are gathered."""
        return -(-self.tokens // self.seq_len)

    def recovery_tokens(self, bits: int) -> int:
        """Tokens to recover on: as asked for, or by default some at 3 bits and below."""
        if self.recover is not None:
            return self.recover
        ours = self.texts and self.method == DEFAULT_METHOD  # published recipes stay as they are
        return DEFAULT_RECOVERY_TOKENS if ours and bits <= MAX_RECOVERED_BITS else 0

    def to_json(self) -> dict[str, Any]:
        """Plain values for the sketch's document; files by name only, never by path."""
        return {
            "method": self.method,
            "texts": [Path(text).name if Path(text).suffix else text for text in self.texts],
            "tokens": self.windows * self.seq_len if self.texts else 0,
            "seq_len": self.seq_len,
            "seed": self.seed,
        }
