"""Sketched weights put into the modules of a block, as the values that they decode to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sketchconv.calibration.fallback import put_fallback
from sketchconv.calibration.linears import put_rows
from sketchconv.calibration.shaped import luts_of
from sketchconv.formats.packing import unpack

if TYPE_CHECKING:
    from sketchconv.calibration.block import BlockWork
    from sketchconv.calibration.state import CalibrationState
    from sketchconv.calibration.weights import Weights
    from sketchconv.formats.manifest import SketchRecord

_ROWS = 1024


def put_finished(
    work: BlockWork, state: CalibrationState, weights: Weights, threads: int | None
) -> None:
    """Give the compressed block the weights that an earlier run left in the state."""
    skipped = state.result(work.index).skipped
    for path, record in work.targets.items():
        if record.name in skipped:
            put_fallback(work.compressed.get_submodule(path), record, weights, threads)
        else:
            found = state.tensors(work.index, (record.index_name, record.lut_name))
            put_tensors(work, path, *found)


def put_tensors(work: BlockWork, path: str, packed: Tensor, lut: Tensor) -> None:
    """Give a module of the compressed block what packed indices and LUTs decode to."""
    record = work.targets[path]
    codes = unpack(packed.numpy(), record.bits, record.group_size).reshape(record.shape)
    put_decoded(work.compressed, path, record, torch.from_numpy(codes), lut)


def put_decoded(
    block: nn.Module, path: str, record: SketchRecord, indices: Tensor, lut: Tensor
) -> None:
    """Give a linear module the values that a sketch decodes to.

    Args:
        block: that the module is in.
        path: of the module.
        record: of its sketch.
        indices: uint8 ``[out, in]``.
        lut: ``[out, G, 2**bits]``, or the scales of a shaped sketch.
    """
    module = block.get_submodule(path)
    with torch.no_grad():
        for begin in range(0, len(indices), _ROWS):
            part = lut[begin : begin + _ROWS].float()
            if record.shaped:
                part = luts_of(part, record.grid, record.bits)
            codes = indices[begin : begin + _ROWS].view(len(part), part.shape[1], -1).long()
            rows = part.gather(2, codes).view(len(part), -1)
            put_rows(module, begin, rows)
