"""Every importer, and who of them knows a checkpoint."""

from __future__ import annotations

from typing import Final

from sketchconv.importers.any_precision import AnyPrecision
from sketchconv.importers.awq import Awq
from sketchconv.importers.base import Checkpoint, Importer
from sketchconv.importers.bits_and_bytes import BitsAndBytes
from sketchconv.importers.gptq import Gptq
from sketchconv.importers.lean_quant import LeanQuant
from sketchconv.importers.sketch_tune import SketchTune
from sketchconv.importers.squeeze_llm import SqueezeLlm

IMPORTERS: Final[tuple[Importer, ...]] = (
    AnyPrecision(),
    Gptq(),
    Awq(),
    BitsAndBytes(),
    LeanQuant(),
    SqueezeLlm(),
    SketchTune(),
)
"""In the order in which they are asked."""


def importer_of(checkpoint: Checkpoint) -> Importer | None:
    """The first importer that knows the checkpoint, or None."""
    return next((i for i in IMPORTERS if i.matches(checkpoint)), None)
