"""What transformers' Trainer is told, and the device and dtype to train in."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from transformers import TrainingArguments

from sketchconv.errors import TuningError
from sketchconv.recovery.student import working_dtype
from sketchconv.tuning.options import TuneOptions

_MEASUREMENTS = 10  # of the held-out samples, unless `eval_steps` says otherwise


def uses_bf16(options: TuneOptions) -> bool:
    """Whether products are made in bfloat16."""
    if options.bf16 is not None:
        return options.bf16
    return working_dtype(device_of(options)) is torch.bfloat16


def device_of(options: TuneOptions) -> torch.device:
    """The device to train on.

    Raises:
        TuningError: cuda is asked for, and there is none.
    """
    there = torch.cuda.is_available()
    if options.device == "cuda" and not there:
        raise TuningError("device cuda: torch finds no GPU; give cpu or auto")
    return torch.device("cuda" if there and options.device != "cpu" else "cpu")


def model_dtype(options: TuneOptions) -> torch.dtype:
    """Dtype of what is frozen and not sketched: norms and, mostly, embeddings."""
    return torch.bfloat16 if uses_bf16(options) else torch.float32


def total_steps(options: TuneOptions, rows: int, processes: int = 1) -> int:
    """Steps that a tuning makes, unless it stops early."""
    if options.max_steps is not None:
        return options.max_steps
    batches = math.ceil(rows / (options.batch_size * processes))
    return max(1, math.ceil(math.ceil(batches / options.gradient_accumulation) * options.epochs))


def first_process() -> bool:
    """Whether this is the first of the processes that a launcher started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def arguments(options: TuneOptions, folder: Path, rows: int) -> TrainingArguments:
    """Arguments of a Trainer for so many rows, with checkpoints in `folder`."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    steps = total_steps(options, rows, processes)
    every = options.eval_steps or max(1, steps // _MEASUREMENTS)
    return TrainingArguments(
        output_dir=str(folder),
        learning_rate=options.learning_rate,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        max_steps=options.max_steps or -1,
        num_train_epochs=options.epochs,
        lr_scheduler_type=options.schedule,
        warmup_steps=options.warmup,
        adam_epsilon=options.epsilon,
        max_grad_norm=options.max_grad_norm,
        activation_checkpointing=options.activation_checkpointing,
        bf16=uses_bf16(options),
        use_cpu=device_of(options).type == "cpu",
        seed=options.seed,
        data_seed=options.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,
        remove_unused_columns=False,
        use_cache=False,  # samples in one row are told apart only without a cache
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to="none",
    )
