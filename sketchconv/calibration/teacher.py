"""The dense model's last hidden states, kept on disk for the recovery."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from sketchconv.calibration.kept import file_digest, read_json, sync, write_json
from sketchconv.calibration.mapped import map_file, map_new
from sketchconv.formats.part import os_failures

_DTYPE = torch.bfloat16


class Teacher:
    """A file of bf16 ``[windows, seq, hidden]``: what goes into the dense model's head.

    Args:
        folder: where the file lies.
        windows: int64 ``[windows, seq]``, the token ids that the states belong to.
    """

    def __init__(self, folder: Path, windows: Tensor) -> None:
        self._file, self._mark = folder / "teacher.hidden", folder / "teacher.json"
        self._windows = tuple(windows.shape)
        self._digest = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
        self._values: Tensor | None = None

    @property
    def done(self) -> bool:
        """Whether the file is complete, undamaged, and belongs to these windows."""
        mark = read_json(self._mark)
        if mark is None or mark.get("windows") != self._digest:
            return False
        try:
            return bool(mark.get("content") == file_digest(self._file))
        except OSError:
            return False

    def write(self, begin: int, hidden: Tensor) -> None:
        """Keep the states ``[n, seq, hidden]`` of windows from `begin` on."""
        if self._values is None:
            self._mark.unlink(missing_ok=True)
            self._values = map_new(self._file, (*self._windows, hidden.shape[-1]), _DTYPE)
        self._values[begin : begin + len(hidden)] = hidden.to("cpu", _DTYPE)

    def finish(self) -> None:
        """Mark the file as complete.

        Raises:
            OutputError: the disk is full or fails.
        """
        if self._values is not None:
            width = self._values.shape[-1]
            self._values = None
            with os_failures(self._file):
                sync(self._file)
                content = file_digest(self._file)
            write_json(self._mark, {"windows": self._digest, "width": width, "content": content})

    def hidden(self) -> Tensor:
        """All states, mapped from the file."""
        width = int((read_json(self._mark) or {})["width"])
        return map_file(self._file, (*self._windows, width), _DTYPE)
