"""Where the kernels run, and the reason wherever they do not."""

from __future__ import annotations

import torch

from sketchconv.kernels.gpu import support

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_every_refusal_has_its_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "the device is cpu" in support.why_not(CPU)
    assert "no CUDA or ROCm device" in support.why_not(CUDA)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert support.why_not(CPU) is None
    assert "CPU tensors only" in support.why_not(CUDA)
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: None)
    assert "triton is not installed" in support.why_not(CPU)


def test_old_gpus_and_other_types_go_through_a_decoded_weight(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for found, runs, dense in (((7, 0), False, True), ((7, 5), True, True), ((8, 0), True, False)):
        monkeypatch.setattr(support, "_capability", lambda index, found=found: found)
        assert (support.why_not(CUDA) is None) == runs
        reason = support.why_dense(CUDA, torch.float16, torch.float32)
        assert (reason is not None) == dense
    assert "no kernel for torch.float64" in support.why_dense(CUDA, torch.float64)
    assert support.nvidia(CUDA)
    assert not support.nvidia(CPU)
