"""Mean squares of what every linear module is given: the diagonal of its Hessian.

They say which columns of a weight matter, for encoders that take one weight per column. One block
is in memory at a time, and only the dense model runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sketchconv.architecture import open_skeleton
from sketchconv.calibration.agreement import check_blocks
from sketchconv.calibration.blocks import find_blocks
from sketchconv.calibration.devices import compute_dtype, find_device
from sketchconv.calibration.heads import final_hidden, find_head
from sketchconv.calibration.inputs import make_windows
from sketchconv.calibration.methods import method_named
from sketchconv.calibration.options import Calibration
from sketchconv.calibration.own_text import OwnText
from sketchconv.calibration.setting import Setting
from sketchconv.calibration.streams import Streams
from sketchconv.calibration.weights import Weights
from sketchconv.errors import CalibrationError
from sketchconv.sources.base import Source

Vector = npt.NDArray[np.float32]
# (what is at work, blocks done, blocks in all)
Tick = Callable[[str, int, int], None]


def mean_squares(
    source: Source, options: Calibration, folder: Path, room: int, tick: Tick | None = None
) -> dict[str, Vector]:
    """Mean squares of the inputs of every linear module in the blocks, and of an untied head.

    Args:
        source: of the dense weights.
        options: text, tokens, seed and device; the method is not used.
        folder: for hidden states that take more than `room` bytes, and text of the model's own.
        room: see there.
        tick: called after each block.

    Returns:
        Stored name of a weight -> float32 ``[columns]``. A weight that no token reached is absent.

    Raises:
        CalibrationError: text, model and device do not fit, or activations are not finite.
    """
    with torch.no_grad():
        model, mapping = open_skeleton(source.config(), source.infos)
        for config in (model.config, model.config.get_text_config()):
            config.use_cache = False
        device = find_device(options.device)
        weights = Weights(model, mapping, source, compute_dtype(source, device), device)
        windows = make_windows(options, weights, 0, OwnText(folder, {}, None))
        path = find_blocks(model)
        setting = Setting(weights, path, (), windows, method_named("rtn"))
        if tick is not None:
            tick("embedding the text", 0, 1)
        streams = Streams(setting, windows.gathered, folder, room, paired=False)
        try:
            check_blocks(streams)
            found = _of_blocks(streams, tick)
            found.update(_of_head(streams))
        finally:
            streams.close()
    return found


class _Squares:
    """Running sums over the tokens that reach one module."""

    def __init__(self) -> None:
        self.tokens = 0
        self.sums: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Take in ``[..., columns]``."""
        rows = rows.reshape(-1, rows.shape[-1])
        sums = rows.float().square().sum(dim=0, dtype=torch.float64)
        self.sums = sums if self.sums is None else self.sums + sums
        self.tokens += len(rows)

    def mean(self, name: str) -> Vector:
        """Their mean, float32 ``[columns]``."""
        if self.sums is None:
            raise TypeError(f"{name}: no token was added")
        if not torch.isfinite(self.sums).all():
            raise CalibrationError(
                f"{name}: NaN or infinity among its inputs; the model overflows, or its weights "
                "are damaged"
            )
        mean: Vector = (self.sums / self.tokens).float().cpu().numpy()
        return mean


def _of_blocks(streams: Streams, tick: Tick | None) -> dict[str, Vector]:
    weights, count = streams.weights, len(streams.blocks)
    found: dict[str, Vector] = {}
    for index, block in enumerate(streams.blocks):
        name = f"{streams.path}.{index}"
        weights.fill(name)
        with _watched(block) as squares:
            streams.advance(index, name, block, block)
        for path, seen in squares.items():
            stored = weights.stored_name(f"{name}.{path}.weight")
            if stored is not None and seen.tokens:
                found[stored] = seen.mean(stored)
        weights.empty(name)
        if tick is not None:
            tick(f"block {index + 1}/{count}", index + 1, count)
    return found


@contextmanager
def _watched(block: nn.Module) -> Iterator[dict[str, _Squares]]:
    """Sums over what the linear modules in a block are given while the context lasts."""
    from transformers.pytorch_utils import Conv1D

    found: dict[str, _Squares] = {}
    handles = []
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            found[path] = _Squares()
            handles.append(module.register_forward_pre_hook(_adding(found[path])))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _adding(squares: _Squares) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        squares.add(args[0])

    return hook


def _of_head(streams: Streams) -> dict[str, Vector]:
    """Of the output head, unless its weight is the embedding's too, whose rows are looked up."""
    model, head = streams.model, find_head(streams.model)
    stored = _stored_weight(streams, head)
    tied = stored == _stored_weight(streams, model.get_input_embeddings())
    if stored is None or tied:
        return {}
    squares = _Squares()
    for _, hidden in final_hidden(streams):
        squares.add(hidden)
    return {stored: squares.mean(stored)}


def _stored_weight(streams: Streams, module: nn.Module | None) -> str | None:
    """The source's name of a module's weight."""
    paths = (path for path, found in streams.model.named_modules() if found is module)
    return next((streams.weights.stored_name(f"{path}.weight") for path in paths), None)
