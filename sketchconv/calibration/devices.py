"""Where a calibration computes, and in which dtype."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from sketchconv.errors import CalibrationError

if TYPE_CHECKING:
    from sketchconv.sources.base import Source

# A value of these many bytes on average: between those of 16 bits and those of 32.
_NARROW_BYTES = 3


def find_device(name: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda`` or ``cuda:n`` names.

    Raises:
        CalibrationError: no such device; an explicit choice is never replaced by another.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise CalibrationError(f"--device {name}: choose auto, cpu, cuda or cuda:n")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CalibrationError(
            f"--device {name}: torch finds no CUDA device here; use --device cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CalibrationError(
            f"--device {name}: there are {torch.cuda.device_count()} CUDA devices"
        )
    return device


def compute_dtype(source: Source, device: torch.device) -> torch.dtype:
    """bfloat16 for checkpoints of 16 bits or fewer, where the device has it, else float32.

    Bits are those of the weight files: values of 8-bit floats and of GGUF's blocks are float32 once
    they are read, and would otherwise take the time and room of a float32 model. Statistics are
    float32 sums in any case.
    """
    values = sum(math.prod(info.shape) for info in source.infos.values())
    narrow = source.nbytes < _NARROW_BYTES * values
    return torch.bfloat16 if narrow and _fast_bf16(device) else torch.float32


def _fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    from sketchconv.machine import find_machine

    features = find_machine().features or {}
    return bool(features.get("amx-bf16") or features.get("avx512bf16"))
