"""Tensors in files."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from sketchconv.calibration.mapped import map_file, map_new
from sketchconv.errors import CalibrationError


def test_what_is_written_is_in_the_file(tmp_path):
    path = tmp_path / "a.hidden"
    path.write_bytes(b"of an earlier run, and longer than what comes now")
    tensor = map_new(path, (2, 3, 4), torch.bfloat16)
    assert path.stat().st_size == 48
    tensor.copy_(torch.arange(24).view(2, 3, 4))
    again = map_file(path, (2, 3, 4), torch.bfloat16)
    assert torch.equal(again.float().view(-1), torch.arange(24.0))


def test_nothing_to_keep(tmp_path):
    assert map_new(tmp_path / "a", (0, 3, 4), torch.float32).shape == (0, 3, 4)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_a_full_disk_is_found_before_anything_is_written(tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CalibrationError, match="96 bytes for hidden states: No space left"):
        map_new(tmp_path / "a", (2, 3, 4), torch.float32)
    assert not list(tmp_path.iterdir())
