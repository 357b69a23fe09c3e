"""What a calibration did, for the report of a conversion."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sketchconv.calibration.state import BlockResult, WeightResult

if TYPE_CHECKING:
    from sketchconv.calibration.setting import Setting
    from sketchconv.plan import Step


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


def not_run(note: str) -> RecoveryReport:
    """The report on a recovery that was not run, and why."""
    return RecoveryReport("kl", None, None, False, 0, 0.0, f"not run: {note}")


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


def make_report(
    setting: Setting,
    steps: Iterable[Step],
    results: Sequence[BlockResult],
    seconds: float,
    peak: int,
) -> CalibrationReport:
    """The report on finished blocks.

    Args:
        setting: of the calibration.
        steps: of the plan; linear weights outside the blocks are not calibrated.
        results: of every block.
        seconds, peak: wall time, and anonymous memory in bytes.
    """
    skipped = {name: why for block in results for name, why in block.skipped.items()}
    inside = {record.name for block in setting.targets for record in block.values()}
    for step in steps:
        if step.record is not None and step.role == "linear" and step.name not in inside:
            skipped[step.name] = "outside the blocks"
    return CalibrationReport(
        method=setting.method.name,
        tokens=setting.tokens,
        device=str(setting.weights.device),
        dtype=str(setting.weights.dtype).removeprefix("torch."),
        blocks=len(setting.targets),
        seconds=seconds,
        weights=tuple(weight for block in results for weight in block.weights),
        skipped=skipped,
        peak_anonymous=peak,
        recovery=_rebuilt([block.rebuilt for block in results if block.rebuilt is not None]),
    )


def _rebuilt(blocks: Sequence[Mapping[str, Any]]) -> RecoveryReport | None:
    """One report for blocks that were recovered one by one: the mean of their errors."""
    if not blocks:
        return None
    kept = sum(block["kept"] for block in blocks)
    return RecoveryReport(
        "error",
        math.fsum(block["before"] for block in blocks) / len(blocks),
        math.fsum(block["after"] for block in blocks) / len(blocks),
        bool(kept),
        max(block["tokens"] for block in blocks),
        math.fsum(block["seconds"] for block in blocks),
        f"block by block, better in {kept} of {len(blocks)}",
    )
