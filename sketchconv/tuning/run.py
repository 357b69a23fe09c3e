"""`tune`: a sketch and data in, a task delta out."""

from __future__ import annotations

import math
import os
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, PreTrainedModel, PrinterCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from sketchconv.deltas import create
from sketchconv.deltas.making import plain_task
from sketchconv.errors import EvaluationError, TuningError
from sketchconv.evaluation.network import Network
from sketchconv.positions import model_positions
from sketchconv.runtime.load import load, load_tokenizer
from sketchconv.tuning.arguments import arguments, first_process, model_dtype
from sketchconv.tuning.callbacks import Reporter
from sketchconv.tuning.documents import data_digest
from sketchconv.tuning.masters import tuned_luts
from sketchconv.tuning.material import Material, gather
from sketchconv.tuning.options import ProgressCallback, TuneOptions, Tuning
from sketchconv.tuning.outcome import result_of, task_of
from sketchconv.tuning.packing import Collator, Rows, keeps_samples_apart
from sketchconv.tuning.prepare import prepare_for_lut_training
from sketchconv.tuning.trainer import LutTrainer
from sketchconv.tuning.workplace import Workplace, base_digest, check_output

_PROBE_TOKENS = 16


def tune(
    base: str | os.PathLike[str],
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: TuneOptions | None = None,
    *,
    eval_data: str | os.PathLike[str] | None = None,
    name: str | None = None,
    resume: bool = False,
    force: bool = False,
    progress: ProgressCallback | None = None,
) -> Tuning:
    """Train the LUTs of the sketch `base` on `data`, and write them to `output` as a delta.

    The loss is next-token cross-entropy: over all tokens of texts, over completions, over what the
    assistant says in chats. While it runs, checkpoints lie in `OUTPUT.tuning`; the folder is
    removed when the delta is written. The LUTs with the lowest held-out loss are written, rounded
    to the base's dtype. The same inputs give the same bytes on the same machine with the same
    number of threads, resumed or not. Under `accelerate launch` every process takes its share of
    the rows, and the first one writes.

    Args:
        base: a sketch, bundle or folder, of a causal language model.
        data: `.txt` or `.jsonl`, see `documents.read_documents`.
        output: path that ends in `.sktch`, or of a folder to make.
        options: see `TuneOptions`.
        eval_data: held-out data; None holds out a share of `data`.
        name: of the task, for the delta's own description.
        resume: go on after the last checkpoint of an interrupted tuning.
        force: replace an existing output, and drop an unfinished tuning.
        progress: called after every step and measurement.

    Raises:
        TuningError: options, data or model do not fit; or the loss was not finite from the start.
        LoadError: `base` is no sound sketch.
        OutputError: the output exists or cannot be written.
        Suspended: interrupted; what is kept is told.
    """
    chosen = options or TuneOptions()
    base, data, output = Path(base), Path(data), Path(output)
    held = None if eval_data is None else Path(eval_data)
    first = first_process()
    files = (data,) if held is None else (data, held)
    check_output(output, (base, *files), force=force)
    plain_task({"name": name, "files": [path.name for path in files]})
    started = time.perf_counter()
    tokenizer = load_tokenizer(base)
    model = _model(base, chosen)
    material = gather(tokenizer, data, held, _vocabulary(model), chosen)
    _check_packing(model, material, chosen)
    prepare_for_lut_training(
        model, embeddings=chosen.embeddings, head=chosen.head, gradient=chosen.gradient
    )
    place = Workplace(output, _setting(base, data, held, chosen), mine=first)
    with closing(place):
        checkpoint = place.open(resume=resume, force=force)
        reporter = Reporter(progress if first else None)
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        trainer = _trainer(model, material, chosen, place.folder, reporter, Collator(int(padding)))
        try:
            before = _first_loss(trainer)
            _train(trainer, checkpoint)
            seconds = time.perf_counter() - started
            result = result_of(output, trainer, material, reporter, before, seconds)
            return _written(result, trainer, base, place, name=name, force=force)
        except KeyboardInterrupt:
            raise place.suspended() from None


def _model(base: Path, options: TuneOptions) -> Any:
    """The base in the dtype to train in.

    Raises:
        TuningError: it is no causal language model, or does not know rows of this length.
    """
    model: Any = load(base, dtype=model_dtype(options))
    probe = torch.arange(_PROBE_TOKENS)[None] % _vocabulary(model)
    try:
        with torch.no_grad():
            Network(model, str(base)).states(probe)
    except EvaluationError as error:
        raise TuningError(
            f"{error}; for other models prepare_for_lut_training and transformers' Trainer"
        ) from None
    longest = model_positions(model)
    if longest is not None and options.seq_len > longest:
        raise TuningError(
            f"{base}: the model knows {longest} positions, --seq-len is {options.seq_len}"
        )
    return model


def _vocabulary(model: Any) -> int:
    embedding = model.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None)
    return int(model.config.get_text_config().vocab_size if rows is None else rows)


def _check_packing(model: PreTrainedModel, material: Material, options: TuneOptions) -> None:
    packed = any(len(row) > 1 for row in (*material.rows, *material.held_out))
    if options.packing and packed and not keeps_samples_apart(model):
        raise TuningError(
            f"{type(model).__name__} mixes samples that share a row (it does not start anew where "
            "position ids do); give --no-packing"
        )


def _setting(base: Path, data: Path, held: Path | None, options: TuneOptions) -> dict[str, Any]:
    return {
        "base": base_digest(base),
        "data": data.name,
        "data_sha256": data_digest(data),
        "eval_data": None if held is None else held.name,
        "eval_data_sha256": None if held is None else data_digest(held),
        **options.to_json(),
    }


def _trainer(
    model: PreTrainedModel,
    material: Material,
    options: TuneOptions,
    folder: Path,
    reporter: Reporter,
    collator: Collator,
) -> LutTrainer:
    callbacks: list[Any] = [reporter]
    if options.patience:
        callbacks.append(EarlyStoppingCallback(options.patience))
    trainer = LutTrainer(
        model=model,
        args=arguments(options, folder, len(material.rows)),
        train_dataset=Rows(material.rows),
        eval_dataset=Rows(material.held_out),
        data_collator=collator,
        callbacks=callbacks,
        lut_optimizer=options.optimizer,
        relative=options.relative,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _first_loss(trainer: LutTrainer) -> float:
    loss = trainer.evaluate()["eval_loss"]
    if not math.isfinite(loss):
        raise TuningError(
            f"the held-out loss of the base is {loss}; look at the sketch with `sketchconv eval`"
        )
    return loss


def _train(trainer: LutTrainer, checkpoint: Path | None) -> None:
    """All steps that are missing; none after a checkpoint with which training had ended."""
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        control = state.stateful_callbacks.get("TrainerControl", {})
        if control.get("args", {}).get("should_training_stop"):
            trainer.restore(checkpoint, state)
            return
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def _written(
    result: Tuning,
    trainer: LutTrainer,
    base: Path,
    place: Workplace,
    *,
    name: str | None,
    force: bool,
) -> Tuning:
    """Write the delta from the main process; the others only report."""
    if not place.mine:
        return result
    task = task_of(result, place.setting, name)
    model: Any = trainer.model
    luts = tuned_luts(model)
    summary = create(base, luts, result.output, task=task, force=force)
    place.finish()
    return replace(result, output_bytes=summary.nbytes)
