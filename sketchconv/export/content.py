"""What an export puts into its file, whatever the source: tensors and metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sketchconv.export.plan import ExportPlan
from sketchconv.formats.gguf_layout import ALIGNMENT


@dataclass(frozen=True, slots=True)
class GgufContent:
    """Plan and metadata of a GGUF file.

    Attributes:
        plan: its tensors.
        values: its metadata, encoded, in order.
        tokenizer: what kind it has, in words.
        alignment: of its data.
    """

    plan: ExportPlan
    values: Mapping[str, bytes]
    tokenizer: str
    alignment: int = ALIGNMENT
