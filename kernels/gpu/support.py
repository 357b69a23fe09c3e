"""What the Triton kernels can run on, with the reason wherever they cannot."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch

SMALLEST = (7, 5)  # below, Triton itself has no code generator
TENSOR_CORES = (8, 0)  # below, kernels with `tl.dot` spill kilobytes of registers
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


def why_not(device: torch.device) -> str | None:
    """Why no Triton kernel runs on `device`, or None where they do."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install sketchconv[gpu])"
    if interpreting():
        return None if device.type == "cpu" else "TRITON_INTERPRET is set: CPU tensors only"
    if device.type != "cuda":
        return f"the device is {device.type}, the Triton kernels need CUDA or ROCm"
    if not torch.cuda.is_available():
        return "torch sees no CUDA or ROCm device"
    found = _capability(device.index)
    if found < SMALLEST and torch.version.hip is None:
        return f"compute capability {found[0]}.{found[1]}, Triton needs 7.5"
    return None


def why_dense(device: torch.device, *dtypes: torch.dtype) -> str | None:
    """Why a product on `device` has to go through a decoded weight and the vendor's BLAS, or None.

    Asked only where `why_not` is None.
    """
    for dtype in dtypes:
        if dtype not in DTYPES:
            return f"no kernel for {dtype}: float16, bfloat16 and float32 only"
    if interpreting() or torch.version.hip is not None:
        return None
    found = _capability(device.index)
    if found < TENSOR_CORES:
        return f"compute capability {found[0]}.{found[1]}: the products need 8.0"
    return None


def nvidia(device: torch.device) -> bool:
    """Whether PTX may be emitted for `device`: NVIDIA, and compiled rather than interpreted."""
    return device.type == "cuda" and torch.version.hip is None and not interpreting()


@cache
def _capability(index: int | None) -> tuple[int, int]:
    major, minor = torch.cuda.get_device_capability(index)
    return int(major), int(minor)
