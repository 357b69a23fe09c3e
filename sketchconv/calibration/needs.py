"""How much memory a calibration takes, known before the first block."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sketchconv.calibration.mixtures import SUMS_BYTES, sums_of_experts
from sketchconv.calibration.state import begun
from sketchconv.calibration.streams import BATCH_TOKENS
from sketchconv.errors import CalibrationError
from sketchconv.memory import anonymous_bytes
from sketchconv.recovery.options import RATED_TOKENS
from sketchconv.recovery.room import free_bytes

if TYPE_CHECKING:
    from torch import nn

    from sketchconv.calibration.setting import Setting
    from sketchconv.job import Job

# Square float32 matrices over the inputs of a weight: Hessian, held-out and cross; two of the best
# damping so far and two of the next, with as much again in float64 while it is factored; the
# held-out one in the order of the columns.
_SQUARES = 12
# Float32 copies of the weights that are solved together: as read, target, residual, work, codes.
_COPIES = 5
# Activations of one batch in a block, in widths of its widest weight, in both models.
_ACTIVATIONS = 8
# Float32 vectors over all LUT entries; and copies of a layer's inputs and outputs in a step.
_MASTERS = 8
_KEPT = 2


def working_memory(setting: Setting) -> int:
    """Bytes beyond what the process holds now: one block twice, its sums and solve, a batch.

    Hidden states of all windows are not counted: they go to disk where they do not fit. The
    embedding is held before the first block is solved, with one block at a time, and not later.
    """
    model = setting.weights.model
    size = setting.weights.dtype.itemsize
    blocks = model.get_submodule(setting.path)
    largest = max(
        sum(math.prod(p.shape) for p in block.parameters()) for block in blocks.children()
    )
    records = [record for block in setting.targets for record in block.values()]
    widest = max((record.shape[1] for record in records), default=0)
    weights = max((math.prod(record.shape) for record in records), default=0)
    features = max((max(record.shape) for record in records), default=0)
    inside = 2 * largest * size + 4 * _SQUARES * widest**2 + 4 * _COPIES * 2 * weights
    mixtures = (sums_of_experts({p: r.shape for p, r in b.items()}) for b in setting.targets)
    inside += min(SUMS_BYTES, max(mixtures, default=0))
    activations = _ACTIVATIONS * BATCH_TOKENS * features * size
    outside = (_parameters(model) - _parameters(blocks) + largest) * size
    return max(inside, outside) + activations


def training_memory(setting: Setting, sketch_bytes: int) -> int:
    """Bytes that the recovery of the whole model takes: the sketch, its LUTs' training, a step.

    Each LUT entry has a float32 master, two averages, a step size, a gradient and the best so far;
    each linear layer of each block keeps what goes in and out of it for the backward pass.

    Args:
        setting: of the calibration.
        sketch_bytes: of the whole sketch; what is dense in it is copied to the training's dtype.
    """
    records = [record for block in setting.targets for record in block.values()]
    entries = sum(r.shape[0] * r.groups << r.bits for r in records)
    kept = sum(sum(record.shape) for record in records) * RATED_TOKENS
    return 2 * sketch_bytes + 4 * _MASTERS * entries + 4 * _KEPT * kept


def fits_whole(setting: Setting, sketch_bytes: int, limit: int | None) -> bool:
    """Whether the whole model can be recovered within a limit, or in what is free."""
    needed = training_memory(setting, sketch_bytes)
    device = setting.weights.device
    if limit is not None and device.type == "cpu":
        return anonymous_bytes() + needed <= limit
    free = free_bytes(device)
    return free is None or needed <= free


def by_blocks(job: Job, setting: Setting) -> bool:
    """Whether each block is recovered by itself, rather than the whole model in the end.

    What memory is free changes from run to run: one that goes on does as the first one did.
    """
    by = "auto" if job.calibration is None else job.calibration.recover_by
    if by != "auto":
        return by == "blocks"
    earlier = begun(job.output)
    if earlier is not None:
        return bool(earlier.get("rebuilt"))
    return not fits_whole(setting, job.output_bytes, job.max_memory)


def _parameters(module: nn.Module) -> int:
    return sum(math.prod(parameter.shape) for parameter in module.parameters())


def check_memory(setting: Setting, limit: int | None) -> None:
    """Refuse a limit that one block cannot be calibrated in.

    Raises:
        CalibrationError: names both figures.
    """
    if limit is None or setting.weights.device.type != "cpu":
        return
    used, needed = anonymous_bytes(), working_memory(setting)
    if used + needed > limit:
        raise CalibrationError(
            f"--max-memory {limit:,} bytes is too little to calibrate: {used:,} are in use and "
            f"about {needed:,} more are needed for one block, its statistics and its solver"
        )
