"""Recovery block by block, as a part of the calibration: where the whole model cannot be trained.

A block that was just sketched has its LUTs trained so that from the compressed model's hidden
states it gives the dense model's. Only that block is in memory. Weaker than training the whole
model against the dense one's predictions: a block does not know what later ones do with its error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sketchconv.calibration import blocks as around
from sketchconv.calibration.blocks import Call
from sketchconv.calibration.hidden import HiddenStates
from sketchconv.calibration.placing import put_tensors
from sketchconv.calibration.streams import Batch
from sketchconv.recovery.blockwise import reconstruct
from sketchconv.recovery.student import working_dtype
from sketchconv.runtime.modules import SketchLinear
from sketchconv.runtime.replace import sketched

if TYPE_CHECKING:
    from pathlib import Path

    from sketchconv.calibration.block import BlockWork
    from sketchconv.calibration.streams import Streams
    from sketchconv.recovery.options import RecoveryOptions


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What the recovery of one block did: squared error of its outputs, relative to their size."""

    before: float
    after: float
    kept: bool
    tokens: int
    seconds: float


def rebuild(
    work: BlockWork, streams: Streams, options: RecoveryOptions, spill: Path | None
) -> Rebuilt | None:
    """Train the LUTs of a block that has been calibrated; `work` holds the better ones afterwards.

    Args:
        work: with its tensors; what was skipped stays as it is.
        streams: short windows in front of the block, in both models, learned for single windows.
        options: of the training.
        spill: a file for the dense block's outputs; None keeps them in memory.

    Returns:
        None where no weight of the block is sketched.
    """
    call = streams.call(work.index, Batch(0, 1))
    outputs = _dense_outputs(work, streams, spill)
    inputs = streams.compressed.values
    dtype = working_dtype(streams.weights.device)
    own = _in_dtype(call, dtype)

    def run(block: nn.Module, x: Tensor) -> Tensor:
        return around.hidden_of(own.run(block, x))

    try:
        with _sketch_modules(work) as modules:
            if not modules:
                return None
            result = reconstruct(work.compressed, inputs, outputs.values, run, options)
            found = {path: _stored(module) for path, module in modules.items()}
    finally:
        outputs.close()
    if result.kept:
        for path, (index, lut) in found.items():
            record = work.targets[path]
            work.tensors[record.index_name], work.tensors[record.lut_name] = index, lut
            put_tensors(work, path, index, lut)
        if work.kept is not None:
            work.kept.forget("compressed")
    return Rebuilt(result.kl_before, result.kl_after, result.kept, result.tokens, result.seconds)


def _dense_outputs(work: BlockWork, streams: Streams, spill: Path | None) -> HiddenStates:
    values = streams.dense.values
    shape = (values.shape[0], values.shape[1], values.shape[2])
    outputs = HiddenStates(shape, values.dtype, spill)
    for batch in streams.batches():
        call = streams.call(work.index, batch)
        hidden = around.hidden_of(call.run(work.dense, streams.dense_hidden(batch)))
        outputs.write(batch.begin, hidden)
    return outputs


@contextmanager
def _sketch_modules(work: BlockWork) -> Iterator[dict[str, SketchLinear]]:
    """Sketch modules in place of the block's sketched ones, for a while."""
    former: dict[str, nn.Module] = {}
    modules: dict[str, SketchLinear] = {}
    try:
        for path, record in work.targets.items():
            if record.index_name not in work.tensors:
                continue
            module = work.compressed.get_submodule(path)
            weight = module.weight
            if not isinstance(weight, Tensor):
                raise TypeError(f"{path} has no weight")
            sketch = sketched(module, record, weight.dtype)
            if not isinstance(sketch, SketchLinear):
                continue
            sketch = sketch.to_empty(device=weight.device)
            sketch.sketch_index = work.tensors[record.index_name].to(weight.device, copy=True)
            sketch.sketch_lut.data = work.tensors[record.lut_name].to(weight.device, copy=True)
            if isinstance(module.bias, Tensor) and sketch.bias is not None:
                sketch.bias.data = module.bias.detach().clone()
            former[path] = module
            work.compressed.set_submodule(path, sketch)
            modules[path] = sketch
        yield modules
    finally:
        for path, module in former.items():
            work.compressed.set_submodule(path, module)


def _stored(module: SketchLinear) -> tuple[Tensor, Tensor]:
    return module.disk_index().cpu().contiguous(), module.sketch_lut.detach().cpu().contiguous()


def _in_dtype(call: Call, dtype: torch.dtype) -> Call:
    """A call with its floats in another dtype."""

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        if isinstance(value, Mapping):
            return {key: cast(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(cast(item) for item in value)
        return value

    return Call(cast(call.args), cast(dict(call.kwargs)), call.keyword)
