"""How much memory a calibration takes, known before the first block."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sketchconv.calibration.mixtures import SUMS_BYTES, sums_of_experts
from sketchconv.calibration.streams import BATCH_TOKENS
from sketchconv.errors import CalibrationError
from sketchconv.memory import anonymous_bytes

if TYPE_CHECKING:
    from torch import nn

    from sketchconv.calibration.setting import Setting

# Square float32 matrices over the inputs of a weight: Hessian, held-out and cross; two of the best
# damping so far and two of the next, with as much again in float64 while it is factored; the
# held-out one in the order of the columns.
_SQUARES = 12
# Float32 copies of the weights that are solved together: as read, target, residual, work, codes.
_COPIES = 5
# Activations of one batch in a block, in widths of its widest weight, in both models.
_ACTIVATIONS = 8


def working_memory(setting: Setting) -> int:
    """Bytes beyond what the process holds now: one block twice, its sums and solve, a batch.

    Hidden states of all windows are not counted: they go to disk where they do not fit. The
    embedding is held before the first block and not with it.
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
    inside += _ACTIVATIONS * BATCH_TOKENS * features * size
    return max(inside, (_parameters(model) - _parameters(blocks)) * size)


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
