"""The plan: what happens to every tensor, decided from metadata alone before a weight is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from sketchconv.formats.manifest import SketchRecord
from sketchconv.formats.tensors import TensorInfo
from sketchconv.sources.forms import Forms

StepAction = Literal["sketch", "copy", "alias", "drop"]
Role = Literal["linear", "head", "embedding", "other"]


@dataclass(frozen=True, slots=True)
class Step:
    """What happens to one source tensor.

    Args:
        info: name, dtype and shape in the source.
        action: sketch, copy, alias (the bytes are another tensor's) or drop.
        reason: why, in words for the user.
        role: linear, head, embedding or other.
        by_user: whether an option or the recipe named this tensor to be kept dense.
        record: how the sketch is stored; only for ``action == "sketch"``.
        ready: whether the source gives indices and tables as they are, so that none are fitted.
        nbytes: bytes of tensor data that the step adds to the output.
    """

    info: TensorInfo
    action: StepAction
    reason: str
    role: Role
    by_user: bool = False
    record: SketchRecord | None = None
    nbytes: int = 0
    ready: bool = False

    @property
    def name(self) -> str:
        """Name of the source tensor."""
        return self.info.name

    @property
    def parameters(self) -> int:
        """Number of values in the source tensor."""
        return math.prod(self.info.shape)


@dataclass(frozen=True, slots=True)
class Coverage:
    """Linear parameters that are sketched, out of those that were not excluded by name."""

    sketched: int
    eligible: int

    @property
    def fraction(self) -> float:
        """Share of the eligible linear parameters that is sketched; 1 when there are none."""
        return self.sketched / self.eligible if self.eligible else 1.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Every step of a conversion, in the order in which the source names its tensors.

    Attributes:
        steps: one for each tensor; sketched weights are matrices ``[out, in]``.
        aliases: tied weights: absent name -> stored name.
        coverage: how much is sketched.
        notes: hints for the user.
        forms: how the source stores the matrices that are sketched.
    """

    steps: tuple[Step, ...]
    aliases: Mapping[str, str]
    coverage: Coverage
    notes: tuple[str, ...]
    forms: Forms = field(default_factory=Forms)

    @property
    def sketches(self) -> tuple[SketchRecord, ...]:
        """Records of all sketched weights."""
        return tuple(step.record for step in self.steps if step.record is not None)

    @property
    def ready(self) -> bool:
        """Whether sketches are taken over from the source rather than fitted."""
        return any(step.ready for step in self.steps)

    @property
    def plain(self) -> tuple[TensorInfo, ...]:
        """Tensors that are copied."""
        return tuple(step.info for step in self.steps if step.action == "copy")

    def count(self, action: StepAction) -> int:
        """Number of steps with this action."""
        return sum(step.action == action for step in self.steps)
