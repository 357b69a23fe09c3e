"""In which dtype a calibration computes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sketchconv.calibration import devices


@pytest.mark.parametrize(
    ("nbytes", "fast", "expected"),
    [
        (4096 * 1024 * 4, True, torch.float32),
        (4096 * 1024 * 2, True, torch.bfloat16),
        (4096 * 1024 * 2, False, torch.float32),
        (4096 * 1024, True, torch.bfloat16),  # 8-bit floats, whose values are float32 when read
        (4096 * 1024 * 9 // 16, True, torch.bfloat16),  # GGUF's Q4_0
    ],
)
def test_narrow_checkpoints_are_computed_in_bfloat16(monkeypatch, nbytes, fast, expected):
    info = SimpleNamespace(shape=(4096, 1024), dtype="F32")
    source = SimpleNamespace(infos={"weight": info}, nbytes=nbytes)
    monkeypatch.setattr(devices, "_fast_bf16", lambda _device: fast)
    assert devices.compute_dtype(source, torch.device("cpu")) is expected
