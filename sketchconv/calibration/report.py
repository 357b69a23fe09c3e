"""What a calibration did, for the report of a conversion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sketchconv.calibration.state import WeightResult


@dataclass(frozen=True, slots=True)
class RecoveryReport:
    """What the recovery did.

    Args:
        measure: ``"kl"`` (nats per token to the dense model) or ``"error"`` of hidden states.
        before, after: that measure on held-out tokens.
        kept: whether the recovered LUTs were kept.
        tokens: trained on, repeats counted.
        seconds: wall time.
        note: why it stopped early, or was not run.
    """

    measure: str
    before: float | None
    after: float | None
    kept: bool
    tokens: int
    seconds: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """What a calibration did.

    Args:
        method: its name.
        tokens: whose activations were gathered.
        device, dtype: of the forward passes.
        blocks: how many.
        seconds: wall time.
        weights: one entry per calibrated weight.
        skipped: weight -> why it was left to the calibration-free path.
        peak_anonymous: highest anonymous memory seen, in bytes.
        recovery: None where there was none.
    """

    method: str
    tokens: int
    device: str
    dtype: str
    blocks: int
    seconds: float
    weights: tuple[WeightResult, ...]
    skipped: Mapping[str, str]
    peak_anonymous: int
    recovery: RecoveryReport | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """Fallbacks, a line for each."""
        lines = []
        if self.skipped:
            lines.append(
                f"{len(self.skipped)} weights not calibrated, but fitted without data; their names "
                "follow"
            )
        lines += [f"{w.name}: {note}" for w in self.weights for note in w.notes]
        lines += [f"{name}: not calibrated, {why}" for name, why in self.skipped.items()]
        return tuple(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "notes": list(self.notes)}
