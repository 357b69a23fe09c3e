"""The kernels of a device, and the order in which they want an index."""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

DISK, DEVICE = "planes-le", "device"
GPU = "sketchconv.kernels.gpu"


def on_gpu(tensor: Tensor) -> bool:
    """Whether a tensor is where the GPU kernels could run (CUDA or ROCm)."""
    return tensor.is_cuda


def gpu_kernels(tensor: Tensor) -> ModuleType | None:
    """The GPU kernels (`sketchconv.kernels.gpu.ops`), None for tensors elsewhere.

    Also None, with one warning that says why, where a GPU cannot run them: plain torch operations
    take over, slower and with the same results.
    """
    if not on_gpu(tensor):
        return None
    return _kernels(tensor.device)


@cache
def _kernels(device: torch.device) -> ModuleType | None:
    reason = import_module(f"{GPU}.support").why_not(device)
    if reason is None:
        return import_module(f"{GPU}.ops")
    warnings.warn(
        f"sketches on {device} run as plain torch operations, slowly: {reason}", stacklevel=2
    )
    return None


def arranged(index: Tensor, bits: int, group_columns: int) -> Tensor:
    """An index of the disk's order in that of the GPU kernels."""
    changed: Tensor = import_module(f"{GPU}.layout").repack(index, bits, group_columns)
    return changed


def restored(index: Tensor, bits: int, group_columns: int) -> Tensor:
    """The inverse of `arranged`."""
    changed: Tensor = import_module(f"{GPU}.layout").restore(index, bits, group_columns)
    return changed
