"""The plan of an export: every tensor of the output, decided from metadata alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from sketchconv.export.architectures import Change
from sketchconv.formats.gguf_layout import GgufInfo


@dataclass(frozen=True, slots=True)
class ExportStep:
    """One tensor of the output.

    Args:
        info: its GGUF name, shape and type.
        reason: why it has this type, in words for the user.
        source: the source's tensor; None for one that is made from `values`.
        change: what is done to rows or values.
        head_rows: rows of one attention head, for the rotary changes.
        verbatim: the source's bytes are copied as they are.
        values: of a one-dimensional tensor that the source does not have.
    """

    info: GgufInfo
    reason: str
    source: str | None = None
    change: Change = "none"
    head_rows: int = 0
    verbatim: bool = False
    values: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """The GGUF name."""
        return self.info.name

    @property
    def rows(self) -> int:
        """Rows: all axes but the last, multiplied."""
        return math.prod(self.info.shape[:-1])

    @property
    def parameters(self) -> int:
        """Number of values."""
        return math.prod(self.info.shape)


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """Every tensor of the output in its order, what was left out and why, and hints."""

    steps: tuple[ExportStep, ...]
    left_out: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Values in all tensors."""
        return sum(step.parameters for step in self.steps)

    def types(self) -> dict[str, int]:
        """Parameters by type, the most frequent first."""
        counts: Counter[str] = Counter()
        for step in self.steps:
            counts[step.info.type.name] += step.parameters
        return dict(counts.most_common())

    def main_type(self) -> str:
        """The type of most parameters."""
        return next(iter(self.types()), "F32")
