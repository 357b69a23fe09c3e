"""Checkpoints of a LUT training: masters, optimizer, schedule and random numbers, no pickle.

A checkpoint folder holds `luts.safetensors`, `optimizer.safetensors` (with the schedule as JSON in
its metadata), `random.safetensors` for each process, and transformers' `trainer_state.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sketchconv.errors import TuningError
from sketchconv.tuning.masters import Master

LUTS = "luts.safetensors"
OPTIMIZER = "optimizer.safetensors"


def save_masters(folder: Path, masters: Sequence[Master]) -> None:
    """Write the float32 masters under their weights' names."""
    tables = {m.name: m.parameter.detach().cpu().contiguous() for m in masters}
    _write(folder / LUTS, tables, {})


def load_masters(folder: Path, masters: Sequence[Master]) -> None:
    """Read them back into the model.

    Raises:
        TuningError: the checkpoint is damaged or is one of another sketch.
    """
    tables = _read(folder / LUTS)
    shapes = {m.name: m.parameter.shape for m in masters}
    if {name: table.shape for name, table in tables.items()} != shapes:
        raise TuningError(
            f"{folder}: the checkpoint has other LUTs than the sketch; it is of another training"
        )
    for master in masters:
        master.parameter.data.copy_(tables[master.name])


def save_optimizer(
    folder: Path, optimizer: Any, schedule: Mapping[str, Any], names: Sequence[str]
) -> None:
    """Write the optimizer's tensors by weight name, and the state of the learning rate."""
    state = optimizer.state_dict()["state"]
    tensors = {
        f"{name}:{key}": value.detach().cpu().contiguous()
        for number, name in enumerate(names)
        for key, value in state.get(number, {}).items()
    }
    rates = [group["lr"] for group in optimizer.param_groups]
    facts = {
        "schedule": json.dumps(dict(schedule)),
        "lr": repr(rates),
        "optimizer": _kind(optimizer),
    }
    _write(folder / OPTIMIZER, tensors, facts)


def load_optimizer(folder: Path, optimizer: Any, names: Sequence[str]) -> dict[str, Any]:
    """Read the tensors into `optimizer`; returns the state of the schedule.

    Raises:
        TuningError: the checkpoint is damaged, or is one of another optimizer or sketch.
    """
    path = folder / OPTIMIZER
    tensors = _read(path)
    whole = optimizer.state_dict()
    numbers = {name: number for number, name in enumerate(names)}
    whole["state"] = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(":")
        whole["state"].setdefault(numbers[name], {})[part] = tensor
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    if metadata.get("optimizer") != _kind(optimizer):
        raise TuningError(
            f"{path} is of {metadata.get('optimizer')}, this training has {_kind(optimizer)}; give "
            "the same optimizer, or start anew with --force"
        )
    for group, rate in zip(whole["param_groups"], json.loads(metadata["lr"]), strict=True):
        group["lr"] = rate
    optimizer.load_state_dict(whole)
    schedule: dict[str, Any] = json.loads(metadata["schedule"])
    return schedule


def _kind(optimizer: Any) -> str:
    """The class of an optimizer, of one that accelerate has wrapped too."""
    return type(getattr(optimizer, "optimizer", optimizer)).__name__


def save_random(folder: Path, process: int) -> None:
    """Write the state of torch's random numbers: dropout of models that have some."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{n}": state for n, state in enumerate(torch.cuda.get_rng_state_all())}
    _write(folder / f"random-{process}.safetensors", states, {})


def load_random(folder: Path, process: int) -> None:
    """Put the state of torch's random numbers back; nothing where there is none."""
    path = folder / f"random-{process}.safetensors"
    if not path.exists():
        return
    for name, state in _read(path).items():
        kind, _, number = name.partition(":")
        if kind == "cpu":
            torch.set_rng_state(state)
        elif int(number) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(number))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a folder: transformers writes its state file last."""
    numbered = [
        (int(path.name.rpartition("-")[2]), path)
        for path in folder.glob("checkpoint-*")
        if path.name.rpartition("-")[2].isdecimal() and (path / "trainer_state.json").exists()
    ]
    return max(numbered)[1] if numbered else None


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Under another name first: what has this name is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    save_file(dict(tensors), partial, {"format": "pt", **metadata})
    partial.replace(path)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:
        # safetensors raises errors of several kinds, some of its own.
        reason = " ".join(str(error).split())[:200]
        raise TuningError(
            f"{path}: not a checkpoint of a LUT training ({reason}); start anew with --force"
        ) from error
