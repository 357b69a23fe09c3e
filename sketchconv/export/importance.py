"""Which columns matter to the encoders of a GGUF export, measured on a text."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from sketchconv.errors import RecipeError
from sketchconv.export.encoders import ENCODERS
from sketchconv.export.plan import ExportPlan, ExportStep
from sketchconv.formats import gguf_values as v

if TYPE_CHECKING:
    from sketchconv.calibration.options import Calibration
    from sketchconv.sources.base import Source

Vector = npt.NDArray[np.float32]
Tick = Callable[[str, int, int], None]
# Hidden states beyond this go to disk where no limit is given.
_HIDDEN_IN_MEMORY: Final = 4 << 30


def check_weighted(plan: ExportPlan, calibration: Calibration) -> None:
    """Refuse a calibration that would change nothing.

    Raises:
        RecipeError: no tensor gets a type whose encoder weighs columns, or no text was named.
        CalibrationError: no such text.
    """
    from sketchconv.calibration.texts import check_texts

    if not calibration.texts:
        raise RecipeError("a calibrated export needs a text: --calibration FILE.txt")
    check_texts(calibration.texts)
    if not any(is_weighted(step) for step in plan.steps):
        raise RecipeError(
            "--calibration weighs the columns of quantized types, and no tensor gets one; choose "
            "a --type such as Q4_K_M, or leave --calibration out"
        )


def is_weighted(step: ExportStep) -> bool:
    """Whether the importance of columns changes what a step writes."""
    return not step.verbatim and ENCODERS[step.info.type.name].weighted


def calibration_keys(calibration: Calibration) -> dict[str, bytes]:
    """What a file says of the text, under the key that llama.cpp uses for its own."""
    names = [Path(text).name if Path(text).suffix else text for text in calibration.texts]
    return {"quantize.imatrix.dataset": v.string(", ".join(names))}


def measure_importance(
    source: Source,
    names: Mapping[str, str],
    calibration: Calibration,
    *,
    folder: Path,
    max_memory: int | None,
    threads: int,
    tick: Tick | None = None,
) -> dict[str, Vector]:
    """Mean square of each input column, by the GGUF names of tensors.

    Args:
        source: of the model, under Hugging Face's names.
        names: GGUF name -> the source's name.
        calibration: text and tokens.
        folder: where a temporary folder may be made for activations.
        max_memory: a quarter of it holds activations; the rest goes to disk.
        threads: of torch.
        tick: called after each block.

    Raises:
        CalibrationError: text and model do not fit.
    """
    from sketchconv.calibration.run import torch_threads
    from sketchconv.calibration.squares import mean_squares

    room = _HIDDEN_IN_MEMORY if max_memory is None else max_memory // 4
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix=".sketchconv-") as name,
        torch_threads(threads),
    ):
        found = mean_squares(source, calibration, Path(name), room, tick)
    return {target: found[stored] for target, stored in names.items() if stored in found}


def summary(steps: Iterable[ExportStep], found: Mapping[str, Any]) -> tuple[str, ...]:
    """A note on quantized tensors that the text says nothing of."""
    missing = [s.name for s in steps if is_weighted(s) and s.name not in found]
    if not missing:
        return ()
    shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
    return (f"columns weighed alike, as the text says nothing of them: {shown}",)
