"""What a calibration works on: the skeleton, its blocks, the weights to sketch, the text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

from sketchconv import __version__
from sketchconv.architecture import open_skeleton
from sketchconv.calibration.blocks import find_blocks
from sketchconv.calibration.devices import compute_dtype, find_device
from sketchconv.calibration.inputs import make_windows
from sketchconv.calibration.linears import is_linear
from sketchconv.calibration.methods import Method, method_named
from sketchconv.calibration.own_text import OwnText, Tick
from sketchconv.calibration.state import state_folder
from sketchconv.calibration.weights import Weights

if TYPE_CHECKING:
    from sketchconv.calibration.options import Calibration
    from sketchconv.calibration.windows import TextWindows
    from sketchconv.formats.manifest import SketchRecord
    from sketchconv.job import Job


@dataclass(frozen=True, slots=True)
class Setting:
    """Everything that is decided before the first block.

    Attributes:
        weights: the skeleton, and what fills it.
        path: of the skeleton's list of blocks.
        targets: for each block, path in the block -> record of a linear module to be sketched.
        windows: token ids to gather from, and to recover on.
        method: of the solver.
    """

    weights: Weights
    path: str
    targets: tuple[dict[str, SketchRecord], ...]
    windows: TextWindows
    method: Method

    @property
    def tokens(self) -> int:
        """Tokens that statistics are gathered from."""
        return self.windows.gathered.numel()

    @property
    def parameters(self) -> int:
        """Weights of all targets."""
        records = (record for block in self.targets for record in block.values())
        return sum(record.shape[0] * record.shape[1] for record in records)


def make_setting(
    job: Job, options: Calibration, recover: int, writing: Tick | None = None
) -> Setting:
    """Open everything, and refuse what does not fit; `writing` sees the model write its own text.

    Raises:
        CalibrationError: the device, the model or the text.
        RecipeError: no such method.
    """
    method = method_named(options.method)
    device = find_device(options.device)
    model, mapping = open_skeleton(job.source.config(), job.source.infos)
    for config in (model.config, model.config.get_text_config()):
        config.use_cache = False
    path = find_blocks(model)
    weights = Weights(model, mapping, job.source, compute_dtype(job.source, device), device)
    targets = _find_targets(job, model.get_submodule(path), path, mapping.modules)
    own = OwnText(state_folder(job.output), _made_from(job, weights), writing)
    windows = make_windows(options, weights, recover, own)
    return Setting(weights, path, targets, windows, method)


def fingerprint(job: Job, setting: Setting, rebuilt: int = 0) -> dict[str, Any]:
    """Everything that decides the result, as plain JSON values; weights by their files.

    `rebuilt` is the number of tokens that each block is recovered on, as a part of the calibration.
    """
    source, windows = job.source, setting.windows.gathered
    records = [step.record for step in job.plan.steps if step.record is not None]
    return {
        "source": [source.id, source.revision, source.format, source.nbytes],
        "files": _files(source.paths),
        "versions": [__version__, torch.__version__, transformers.__version__],
        "tensors": [[i.name, i.dtype, list(i.shape)] for i in source.infos.values()],
        "config": source.config(),
        "sketches": [[r.name, *r.shape, r.bits, r.groups, r.lut_dtype, r.grid] for r in records],
        "method": repr(setting.method),
        "text": _digest(windows),
        "seq_len": windows.shape[1],
        "compute": [setting.weights.device.type, str(setting.weights.dtype)],
        "rebuilt": [rebuilt, _digest(setting.windows.short)] if rebuilt else [],
    }


def _digest(windows: Tensor) -> str:
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()


def _made_from(job: Job, weights: Weights) -> dict[str, Any]:
    """All that decides what the model writes, besides its own sampling."""
    source = job.source
    return {
        "source": [source.id, source.revision, source.format, source.nbytes],
        "files": _files(source.paths),
        "config": source.config(),
        "versions": [__version__, torch.__version__, transformers.__version__],
        "compute": [weights.device.type, str(weights.dtype)],
    }


def _files(paths: Iterable[Path]) -> list[list[Any]]:
    """Name, size and time of change of every weight file."""
    found: list[list[Any]] = []
    for path in paths:
        inside = path.rglob("*.safetensors") if path.is_dir() else [path]
        found += [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in inside]
    return sorted(found)


def _find_targets(
    job: Job, blocks: nn.Module, path: str, modules: Any
) -> tuple[dict[str, SketchRecord], ...]:
    records = {step.name: step.record for step in job.plan.steps if step.record is not None}
    found: list[dict[str, SketchRecord]] = [{} for _ in blocks.children()]
    for stored, name in modules.items():
        if stored not in records or not name.startswith(f"{path}."):
            continue
        index, _, inside = name.removeprefix(f"{path}.").partition(".")
        module = inside.removesuffix(".weight")
        if is_linear(blocks.get_submodule(index).get_submodule(module)):
            found[int(index)][module] = records[stored]
    return tuple(found)
