"""Block-wise reconstruction: the LUTs of one block trained towards the dense block's outputs.

For models that cannot be trained as a whole: only one block, its inputs and its graph are needed at
a time. Weaker than distillation (a block does not know what later blocks do with its error).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sketchconv.recovery.divergence import hidden_error
from sketchconv.recovery.loop import Loop, Task
from sketchconv.recovery.options import ProgressCallback, Recovery, RecoveryError, RecoveryOptions
from sketchconv.recovery.student import one_device, prepared, trainable_layers, working_dtype

Run = Callable[[nn.Module, Tensor], Tensor]


def reconstruct(
    block: nn.Module,
    inputs: Tensor,
    outputs: Tensor,
    run: Run,
    options: RecoveryOptions | None = None,
    progress: ProgressCallback | None = None,
) -> Recovery:
    """Train the LUTs of the sketched layers of `block` in place; never leave it worse than it was.

    The loss is the squared error of the outputs relative to their size.

    Args:
        block: for instance a decoder layer with `SketchLinear` in it, on any device.
        inputs: hidden states that enter the block in the compressed model, ``[windows, length,
            width]`` of any float dtype, in CPU memory or mapped from a file.
        outputs: what the dense block gives for the dense model's inputs, of the same shape.
        run: ``run(block, x)`` calls the block on ``[n, length, width]`` in the dtype of training
            (`student.working_dtype`), with positions, masks and whatever else it takes in the same
            dtype, and returns its hidden states.
        options: as for `train.recover`.
        progress: called after every step, from the calling thread.

    Returns:
        What was done, with `measure` ``"error"``. Where the held-out error did not fall, the block
        is as it was.

    Raises:
        RecoveryError: shapes do not fit, or the block has no sketched layer.
    """
    if inputs.dim() != 3 or inputs.shape[0] < 2 or outputs.shape != inputs.shape:
        raise RecoveryError(
            "recovery: inputs and outputs of a block must be [windows, length, width] with at "
            f"least 2 windows, got {tuple(inputs.shape)} and {tuple(outputs.shape)}"
        )
    modules = trainable_layers(block)
    device = one_device(modules)
    dtype = working_dtype(device)

    def both(rows: Tensor) -> tuple[Tensor, Tensor]:
        return run(block, inputs[rows].to(device, dtype)), outputs[rows].to(device)

    with prepared(block, dtype), torch.enable_grad():
        task = Task(modules, both, hidden_error, inputs.shape[0], inputs.shape[1], "error")
        return Loop(task, options or RecoveryOptions(), progress).run(dtype)
