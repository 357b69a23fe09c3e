"""Whether decoded weights fit into memory beside everything else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from sketchconv.runtime.modules import SketchLinear

SHARE = 3  # activations and gradients want the rest


def weights_fit(modules: Sequence[SketchLinear], dtype: torch.dtype) -> bool:
    """Whether all weights, decoded in `dtype`, take at most a third of the free memory."""
    if not modules:
        return False
    wanted = sum(m.rows * m.columns for m in modules) * dtype.itemsize
    free = free_bytes(modules[0].sketch_lut.device)
    return free is None or wanted * SHARE <= free


def free_bytes(device: torch.device, path: Path = Path("/proc/meminfo")) -> int | None:
    """Free memory of a device; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) << 10 if found else None
