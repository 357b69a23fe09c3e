"""Hidden states of all windows, in memory or in a file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sketchconv.calibration.mapped import map_new


class HiddenStates:
    """The hidden states of every window between two blocks, ``[windows, seq, hidden]``.

    Args:
        shape: windows, tokens per window, width.
        dtype: of the values.
        path: a file to keep them in, or None for memory. Pages of the file are not anonymous
            memory: the system drops them when it needs room.
    """

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, path: Path | None = None
    ) -> None:
        self.path = path
        if path is None:
            self._values = torch.empty(shape, dtype=dtype)
        else:
            self._values = map_new(path, shape, dtype)

    def __len__(self) -> int:
        return self._values.shape[0]

    @property
    def values(self) -> Tensor:
        """All of them; memory-mapped where they are in a file."""
        return self._values

    def read(self, begin: int, end: int, device: torch.device) -> Tensor:
        """Windows [begin, end), on a device; a copy, so that `write` does not change it."""
        return self._values[begin:end].to(device, copy=True)

    def write(self, begin: int, hidden: Tensor) -> None:
        """Put windows in place from `begin` on."""
        self._values[begin : begin + len(hidden)] = hidden.to(self._values.device)

    def close(self) -> None:
        """Forget the values, and remove their file."""
        self._values = torch.empty(0, 0, 0)
        if self.path is not None:
            self.path.unlink(missing_ok=True)
