"""Tiny models of every supported kind, sketched, with their dense twins."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import sketchconv


def _helpers() -> Any:
    """The makers of the runtime tests; conftest files cannot be imported by name."""
    path = Path(__file__).parent.parent / "runtime" / "conftest.py"
    spec = importlib.util.spec_from_file_location("runtime_makers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


_MAKERS = _helpers()


class Pair:
    """A sketched model and its dense twin, both float32 unless told otherwise."""

    def __init__(self, folder: Path, kind: str, changes: dict[str, Any], **options: Any) -> None:
        dtype = options.pop("dtype", torch.float32)
        spread = options.pop("spread", True)
        dense = _MAKERS.build(kind, **changes)
        with torch.no_grad():
            for name, tensor in dense.named_parameters():
                if spread and ("norm" in name or "bias" in name):  # else all ones, all zeros
                    tensor.add_(torch.randn(tensor.shape) * 0.2)
        sketch = _MAKERS.write(dense, folder, **options)
        self.path, self.dense, self.records = sketch.path, dense, sketch.records
        self.model = sketchconv.load(sketch.path, dtype=dtype)

    def exact(self) -> Any:
        """The twin in float64, with the dtype of the model in what is not sketched."""
        import copy

        twin = copy.deepcopy(self.dense)
        with torch.no_grad():
            for name, tensor in twin.named_parameters():
                if name not in self.records:
                    tensor.copy_(tensor.to(self.model.dtype))
        return twin.double()


@pytest.fixture
def pair(tmp_path):
    """Maker: `pair(kind, bits=..., hidden_size=...)`; sketch options by the names of `write`."""
    options = ("bits", "groups", "lut", "shapes", "embeddings", "head", "dtype", "spread")

    def make(kind: str = "LlamaForCausalLM", **given: Any) -> Pair:
        chosen = {name: given.pop(name) for name in options if name in given}
        return Pair(tmp_path / f"{kind}.sktch", kind, given, **chosen)

    return make


@pytest.fixture
def makers():
    """The module with `build` and `write`."""
    return _MAKERS


@pytest.fixture(autouse=True)
def _torch_threads():
    """Tests may change torch's number of threads; the next one starts with two."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
