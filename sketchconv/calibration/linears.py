"""Linear modules of a block: weights ``[out, in]``, also where the module holds the transpose."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies its input with a weight that can be calibrated."""
    return isinstance(module, nn.Linear | Conv1D)


def put_rows(module: nn.Module, begin: int, rows: Tensor) -> None:
    """Replace rows of a linear module's weight, in place.

    Args:
        module: for which `is_linear` holds.
        begin: first row.
        rows: ``[n, in]`` of any float dtype, on any device.
    """
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"a {type(module).__name__} has no weight")
    matrix = weight.T if isinstance(module, Conv1D) else weight
    with torch.no_grad():
        matrix[begin : begin + len(rows)] = rows.to(weight.device, weight.dtype)
