"""Second moments of the inputs of the sketched weights, from a text, one block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sketchconv.architecture import open_skeleton
from sketchconv.calibration.agreement import check_blocks
from sketchconv.calibration.blocks import find_blocks
from sketchconv.calibration.devices import compute_dtype, find_device
from sketchconv.calibration.gather import product
from sketchconv.calibration.inputs import make_windows
from sketchconv.calibration.linears import is_linear
from sketchconv.calibration.methods import method_named
from sketchconv.calibration.own_text import OwnText
from sketchconv.calibration.setting import Setting
from sketchconv.calibration.stages import Stage, find_stages
from sketchconv.calibration.streams import Streams
from sketchconv.calibration.taps import run_tapped
from sketchconv.calibration.weights import Weights
from sketchconv.errors import CalibrationError

if TYPE_CHECKING:
    from sketchconv.calibration.options import Calibration
    from sketchconv.sources.base import Source


@dataclass(frozen=True, slots=True)
class GroupMoments:
    """Weights that get the same inputs, and what those are.

    Attributes:
        names: of the weights, as the source calls them.
        hessian: float32 ``[columns, columns]`` on the CPU, ``X'X / n``.
        tokens: n.
        done: blocks that are done after this group's, of `blocks`.
    """

    names: tuple[str, ...]
    hessian: Tensor
    tokens: int
    done: int
    blocks: int


def group_moments(
    source: Source, options: Calibration, folder: Path, room: int
) -> Iterator[GroupMoments]:
    """Hessians of all linear modules of the blocks, in the order in which they run.

    One block of the model is in memory at a time, and the Hessians of one stage. Under
    `torch.no_grad`, or every activation is kept.

    Args:
        source: of the dense weights.
        options: text, tokens, seed and device; the method is not used.
        folder: for hidden states that take more than `room` bytes.
        room: see there.

    Raises:
        CalibrationError: text, model and device do not fit, or activations are not finite.
    """
    streams = _open(source, options, folder, room)
    try:
        check_blocks(streams)
        count = len(streams.blocks)
        for index, block in enumerate(streams.blocks):
            name = f"{streams.path}.{index}"
            streams.weights.fill(name)
            for stage in _stages(streams, index, block):
                for paths, hessian, tokens in _gathered(streams, index, block, stage):
                    stored = (streams.weights.stored_name(f"{name}.{p}.weight") for p in paths)
                    names = tuple(s for s in stored if s is not None)
                    yield GroupMoments(names, hessian, tokens, index + 1, count)
            streams.advance(index, name, block, block)
            streams.weights.empty(name)
    finally:
        streams.close()


def _open(source: Source, options: Calibration, folder: Path, room: int) -> Streams:
    with torch.no_grad():
        model, mapping = open_skeleton(source.config(), source.infos)
        for config in (model.config, model.config.get_text_config()):
            config.use_cache = False
        device = find_device(options.device)
        weights = Weights(model, mapping, source, compute_dtype(source, device), device)
        windows = make_windows(options, weights, 0, OwnText(folder, {}, None))
        setting = Setting(weights, find_blocks(model), (), windows, method_named("rtn"))
        return Streams(setting, windows.gathered, folder, room, paired=False)


def _stages(streams: Streams, index: int, block: nn.Module) -> list[Stage]:
    linears = [path for path, module in block.named_modules() if is_linear(module)]
    call, hidden = streams.sample(index)
    return find_stages(block, call, hidden, linears)[0]


def _gathered(
    streams: Streams, index: int, block: nn.Module, stage: Stage
) -> Iterator[tuple[tuple[str, ...], Tensor, int]]:
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    for batch in streams.batches():
        tapped = run_tapped(block, streams.call(index, batch), streams.dense_hidden(batch), stage)
        for path, rows in tapped.inputs.items():
            part = product(rows, rows)
            sums[path] = sums[path].add_(part) if path in sums else part
            tokens[path] = tokens.get(path, 0) + len(rows)
    for group in stage.groups:
        first = group.linears[0]
        if first in sums:
            yield group.linears, _mean(sums.pop(first), tokens[first], first), tokens[first]


def _mean(total: Tensor, tokens: int, path: str) -> Tensor:
    if not torch.isfinite(total.sum(dtype=torch.float64)):
        raise CalibrationError(
            f"{path}: NaN or infinity among its inputs; the model overflows, or its weights are "
            "damaged"
        )
    return (total / tokens).float().cpu()
