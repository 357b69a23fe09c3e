"""Whether decoded weights fit into memory beside everything else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from sketchconv.runtime.modules import SketchLinear

SHARE = 3  # activations and gradients want the rest
MEMORY = Path("/proc/meminfo")
CONTROL_GROUP = Path("/sys/fs/cgroup/memory.max")


def weights_fit(
    modules: Sequence[SketchLinear], dtype: torch.dtype, limit: int | None = None
) -> bool:
    """Whether all weights, decoded in `dtype`, take at most a third of the room for them.

    Products of decoded weights and of those decoded tile by tile round differently. On a CPU the
    room is therefore no matter of the moment: `limit` in bytes, or else half of the machine's
    memory. On a GPU it is what is free there.
    """
    if not modules:
        return False
    device = modules[0].sketch_lut.device
    wanted = sum(m.rows * m.columns for m in modules) * dtype.itemsize
    room = free_bytes(device) if device.type == "cuda" else limit
    if room is None:
        room = usual_bytes()
    return room is None or wanted * SHARE <= room


def usual_bytes(memory: Path = MEMORY, group: Path = CONTROL_GROUP) -> int | None:
    """Half of the memory of the machine, or of its control group; None if no one tells."""
    found = [size for size in (_meminfo("MemTotal", memory), _granted(group)) if size is not None]
    return min(found) // 2 if found else None


def free_bytes(device: torch.device, path: Path = MEMORY) -> int | None:
    """Free memory of a device; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return _meminfo("MemAvailable", path)


def _meminfo(name: str, path: Path) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) << 10 if found else None


def _granted(path: Path) -> int | None:
    """Bytes that the control group grants; "max" is no limit."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
