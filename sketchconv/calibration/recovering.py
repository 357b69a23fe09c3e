"""Recover a calibrated sketch before it is written: LUTs trained against the dense model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sketchconv.architecture import open_skeleton
from sketchconv.calibration.devices import find_device
from sketchconv.calibration.heads import find_head
from sketchconv.calibration.kept import save_tensors
from sketchconv.calibration.report import RecoveryReport, not_run
from sketchconv.calibration.state import RECOVERED
from sketchconv.calibration.teacher import Teacher
from sketchconv.calibration.weights import Weights
from sketchconv.formats.rules import INDEX_SUFFIX, LUT_SUFFIX, WEIGHT_SUFFIX
from sketchconv.sources.base import Source

if TYPE_CHECKING:
    from sketchconv.calibration.run import Calibrated
    from sketchconv.job import Job

_DOES_NOT_FIT = (
    "the model and the activations of a step do not fit in memory; --recover-by blocks needs one "
    "block at a time"
)


def recover_draft(
    job: Job,
    calibrated: Calibrated,
    draft: Path,
    tokens: int,
    tick: Callable[[str, int, int], None] | None = None,
) -> RecoveryReport:
    """Train the LUTs of a draft of the sketch, and keep them beside it if they are better.

    Args:
        job: the conversion.
        calibrated: its calibration; the dense model's last hidden states are in its folder.
        draft: a complete sketch.
        tokens: to train on.
        tick: called after each step.
    """
    from sketchconv.recovery.train import RecoveryError, RecoveryOptions, recover
    from sketchconv.runtime.load import load

    teacher = Teacher(calibrated.state.folder, calibrated.windows)
    if not teacher.done:
        return not_run("the dense model's last hidden states are not known")
    device = find_device(job.calibration.device if job.calibration else "auto")
    student = load(draft).to(device)  # type: ignore[arg-type]

    def progress(event: Any) -> None:
        if tick is not None:
            tick(f"recovery: loss {event.loss:.4f}", event.step, event.steps)

    seed = job.calibration.seed if job.calibration else 0
    options = RecoveryOptions(tokens=tokens, seed=seed, max_memory=job.max_memory)
    if tick is not None:
        tick("recovery: measuring first", 0, 1)
    try:
        result = recover(
            student,
            calibrated.windows,
            teacher.hidden(),
            _dense_head(job.source, student),
            options,
            progress,
        )
    except RecoveryError as error:
        return not_run(str(error))
    except (MemoryError, torch.OutOfMemoryError):  # the calibrated sketch is worth writing as it is
        return not_run(_DOES_NOT_FIT)
    if result.kept:
        path = calibrated.state.folder / RECOVERED
        save_tensors(path, _sketches(student, job.source), {})
    return RecoveryReport(
        result.measure,
        result.kl_before,
        result.kl_after,
        result.kept,
        result.tokens,
        result.seconds,
        result.note,
    )


def _sketches(student: Any, source: Source) -> dict[str, Tensor]:
    """Packed indices and LUTs of every sketch, under their stored names."""
    mapping = open_skeleton(source.config(), source.infos)[1]
    stems = {
        name.removesuffix(WEIGHT_SUFFIX): stored.removesuffix(WEIGHT_SUFFIX)
        for stored, name in mapping.modules.items()
    }
    found = {}
    for name, tensor in student.state_dict().items():
        for suffix in (INDEX_SUFFIX, LUT_SUFFIX):
            path = name.removesuffix(suffix)
            if path != name and path in stems:
                found[stems[path] + suffix] = tensor.detach().cpu().contiguous()
    return found


def _dense_head(source: Source, student: Any) -> Tensor | None:
    """The dense head ``[vocabulary, width]`` where the student's own is sketched."""
    output = student.get_output_embeddings()
    if output is None or isinstance(getattr(output, "weight", None), torch.nn.Parameter):
        return None
    model, mapping = open_skeleton(source.config(), source.infos)
    head = find_head(model)
    path = next(name for name, module in model.named_modules() if module is head)
    weights = Weights(model, mapping, source, torch.bfloat16, torch.device("cpu"))
    stored = weights.stored_name(f"{path}{WEIGHT_SUFFIX}")
    return None if stored is None else weights.float32(stored).to(torch.bfloat16)
