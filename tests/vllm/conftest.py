"""vLLM's stand-ins in place of vLLM, and tiny sketches in folders."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

_HERE = Path(__file__).parent


def _module(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def makers():
    """`build` and `write` of the runtime tests; conftest files cannot be imported by name."""
    return _module("runtime_makers_for_vllm", _HERE.parent / "runtime" / "conftest.py")


@pytest.fixture
def vllm(monkeypatch):
    """The stand-ins, found as `vllm` while a test runs."""
    stubs = _module("vllm_stubs", _HERE / "stubs.py")
    for name, module in stubs.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    ours = ("sketchconv.vllm.config", "sketchconv.vllm.method")
    for name in ours:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield stubs
    for name in ours:  # they are bound to these stand-ins
        sys.modules.pop(name, None)
