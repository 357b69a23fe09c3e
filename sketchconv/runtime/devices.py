"""The kernels of a device, and the order in which they want an index."""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from sketchconv.kernels import woven
from sketchconv.kernels.dispatch import choose
from sketchconv.kernels.orders import PLANES, WOVEN

DISK, DEVICE = PLANES, "device"
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


def reads_woven() -> bool:
    """Whether the fastest kernels of this CPU read an index in the order `woven`."""
    return WOVEN in choose().orders


def best_order(index: Tensor, bits: int, group_columns: int) -> str:
    """The order in which the kernels of its device are fastest on `index`, uint8, any order."""
    if gpu_kernels(index) is not None:
        # Only NVIDIA's byte permutation gains by it; the portable kernels read the disk's order.
        return DISK if torch.version.hip is not None else DEVICE
    # What processes share stays what they share: one of them cannot change it for all.
    if index.is_cpu and woven.differs(bits, group_columns) and reads_woven():
        return DISK if index.is_shared() else WOVEN  # type: ignore[no-untyped-call]
    return DISK


def arranged(index: Tensor, bits: int, group_columns: int, order: str) -> Tensor:
    """An index of the disk's order in `order`; the tensor itself where nothing changes."""
    if order == WOVEN:
        return woven.weave(index, bits, group_columns)
    if order == DISK:
        return index
    changed: Tensor = import_module(f"{GPU}.layout").repack(index, bits, group_columns)
    return changed


def restored(index: Tensor, bits: int, group_columns: int, order: str) -> Tensor:
    """The inverse of `arranged`."""
    if order == WOVEN:
        return woven.restore(index, bits, group_columns)
    if order == DISK:
        return index
    changed: Tensor = import_module(f"{GPU}.layout").restore(index, bits, group_columns)
    return changed
