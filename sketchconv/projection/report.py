"""What an extraction did, weight by weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sketchconv.projection.layers import Energies
from sketchconv.projection.options import Target
from sketchconv.projection.unheld import Unheld


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One weight of an extraction, and the norm that it was projected in."""

    name: str
    shape: tuple[int, int]
    metric: str
    energies: Energies

    @property
    def captured(self) -> float | None:
        """``1 - |D - P D|^2 / |D|^2``; None without a change."""
        found = self.energies
        return 1 - found.left / found.change if found.change > 0 else None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        found = self.energies
        return {
            "name": self.name,
            "shape": list(self.shape),
            "metric": self.metric,
            "captured": self.captured,
            "relative_change": _root(found.change, found.start),
            "error_before": _root(found.before, found.tuned),
            "error_after": _root(found.after, found.tuned),
        }


@dataclass(frozen=True, slots=True)
class ExtractReport:
    """A finished extraction.

    Attributes:
        target: "relative" or "absolute".
        metric: "equal", "diagonal" or "hessian": what was asked for; weights that the text says
            nothing of are projected in the norm "equal".
        layers: every sketched weight.
        unheld: what else the fine-tune changed.
        changed: weights of which the delta has LUTs.
        seconds: wall time.
        peak_anonymous: most memory seen, in bytes.
    """

    target: Target
    metric: str
    layers: tuple[LayerReport, ...]
    unheld: tuple[Unheld, ...]
    changed: int
    seconds: float
    peak_anonymous: int

    @property
    def captured(self) -> float | None:
        """Captured share of the energy of all changes together."""
        return self._share("left")

    @property
    def captured_unrounded(self) -> float | None:
        """The same, if LUTs were not rounded to their dtype."""
        return self._share("unrounded")

    def _share(self, left: str) -> float | None:
        change = math.fsum(layer.energies.change for layer in self.layers)
        rest = math.fsum(getattr(layer.energies, left) for layer in self.layers)
        return 1 - rest / change if change > 0 else None

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {
            "target": self.target,
            "metric": self.metric,
            "captured": self.captured,
            "captured_unrounded": self.captured_unrounded,
            "changed": self.changed,
            "layers": [layer.to_json() for layer in self.layers],
            "unheld": [
                {"name": u.name, "relative_change": u.change, "reason": u.reason}
                for u in self.unheld
            ],
            "seconds": round(self.seconds, 3),
            "peak_anonymous": self.peak_anonymous,
        }


def _root(part: float, whole: float) -> float | None:
    return math.sqrt(max(part, 0.0) / whole) if whole > 0 else None
