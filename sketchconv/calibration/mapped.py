"""Tensors in files, mapped into memory."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from torch import Tensor

from sketchconv.errors import CalibrationError


def map_new(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of unspecified values in a new file, in place of any that was there.

    The file has all of its blocks from the start: a write to a mapping that finds the disk full
    would not fail but kill the process.

    Raises:
        CalibrationError: there is no room for it.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    path.unlink(missing_ok=True)
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate") and nbytes:
                os.posix_fallocate(file.fileno(), 0, nbytes)
            else:
                file.truncate(nbytes)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise CalibrationError(
            f"{path}: {nbytes:,} bytes for hidden states: {error.strerror}; free some space, name "
            "an output on another disk, or take fewer --tokens"
        ) from error
    return map_file(path, shape, dtype)


def map_file(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor in a file; what is written to it is written to the file."""
    size = math.prod(shape)
    if not size:
        return torch.empty(shape, dtype=dtype)
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)
