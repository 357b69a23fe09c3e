"""Fine-tunes of tiny models, and plain least squares."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sketchconv.formats.reader import SktchModel

Change = Callable[[str, torch.Tensor], torch.Tensor]


def load(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def save(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    from safetensors.torch import save_file

    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def retuned(folder: Path, out: Path, change: Change) -> Path:
    """A copy of a model folder with other weights."""
    shutil.copytree(folder, out)
    return save(out, {name: change(name, value) for name, value in load(folder).items()})


def noise(scale: float = 0.02, only: str = "_proj.weight") -> Change:
    """Random changes of the weights whose names end so."""
    generator = torch.Generator().manual_seed(3)

    def change(name: str, value: torch.Tensor) -> torch.Tensor:
        if not name.endswith(only):
            return value
        return value + scale * torch.randn(value.shape, generator=generator)

    return change


def codes_of(base: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes ``[out, in]`` and float32 LUTs ``[out, groups, entries]`` of a sketch."""
    with SktchModel.open(base) as model:
        found = model.sketch(name)
    assert found.lut.dtype in (np.float16, np.float32)
    return found.indices, found.lut.astype(np.float32)


def plain_projection(
    codes: np.ndarray, groups: int, entries: int, change: np.ndarray, weights: np.ndarray | None
) -> np.ndarray:
    """Least squares row by row with a dense design matrix, float64 ``[out, groups, entries]``."""
    rows, columns = codes.shape
    root = np.ones(columns) if weights is None else np.sqrt(weights)
    group = np.arange(columns) // (columns // groups)
    out = np.zeros((rows, groups * entries))
    for row in range(rows):
        design = np.zeros((columns, groups * entries))
        design[np.arange(columns), group * entries + codes[row]] = root
        # The solution of least norm: entries that no column uses are 0.
        out[row] = np.linalg.lstsq(design, root * change[row], rcond=None)[0]
    return out.reshape(rows, groups, entries)


@dataclass(frozen=True)
class Trio:
    """A dense model, a fine-tune of its linear weights, and a sketch of the dense one."""

    dense: Path
    tuned: Path
    base: Path
