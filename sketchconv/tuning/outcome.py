"""What came of a training: its result, and what the delta says of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sketchconv.errors import TuningError
from sketchconv.tuning.callbacks import Reporter
from sketchconv.tuning.material import Material
from sketchconv.tuning.options import Tuning
from sketchconv.tuning.trainer import LutTrainer


def result_of(
    output: Path,
    trainer: LutTrainer,
    material: Material,
    reporter: Reporter,
    before: float,
    seconds: float,
) -> Tuning:
    """The result of a training, its delta not yet written.

    Raises:
        TuningError: there are no LUTs to keep.
    """
    after, best = _outcome(trainer)
    return Tuning(
        output=str(output),
        output_bytes=0,
        steps=trainer.state.global_step,
        best_step=best,
        loss_before=before,
        loss_after=after,
        trained=trainer.training.values,
        rows=len(material.rows),
        learned=material.learned,
        eval_learned=material.eval_learned,
        seconds=seconds,
        notes=(*material.notes, *_notes(trainer, before, after)),
        curve=tuple(reporter.curve),
    )


def _outcome(trainer: LutTrainer) -> tuple[float, int]:
    """The held-out loss of the LUTs that the model has now, and the step that they are of."""
    state = trainer.state
    best = state.best_metric
    if state.best_model_checkpoint is not None and best is not None and math.isfinite(best):
        return float(best), int(state.best_global_step or state.global_step)
    loss = trainer.evaluate()["eval_loss"]
    if not math.isfinite(loss) or (trainer.broken_at or 0) == 1:
        raise TuningError(
            "training gave no LUTs to keep: a gradient or the held-out loss was not finite; lower "
            "--learning-rate or look at the data. Nothing was written"
        )
    return loss, state.global_step


def _notes(trainer: LutTrainer, before: float, after: float) -> list[str]:
    notes, state = [], trainer.state
    if trainer.broken_at is not None:
        notes.append(f"stopped at step {trainer.broken_at}: a gradient was not finite")
    elif state.global_step < state.max_steps:
        notes.append(
            f"stopped early at step {state.global_step} of {state.max_steps}: the held-out loss "
            "did not fall any more"
        )
    if after >= before:
        notes.append("the held-out loss did not fall: try another learning rate or more data")
    return notes


def task_of(result: Tuning, setting: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    """What a delta says of its making."""
    files = ("base", "data", "data_sha256", "eval_data", "eval_data_sha256")
    return {
        **({} if name is None else {"name": name}),
        "made_by": "sketchconv tune",
        **{name: setting[name] for name in files if name != "base"},
        "steps": result.steps,
        "best_step": result.best_step,
        "learned_tokens": result.learned,
        "loss_before": result.loss_before,
        "loss_after": result.loss_after,
        "recipe": {name: value for name, value in setting.items() if name not in files},
    }
