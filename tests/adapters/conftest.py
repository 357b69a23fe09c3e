"""Tiny sketches and adapters of them with random LUTs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sketchconv
from sketchconv.adapters.base import base_of
from sketchconv.adapters.batch import BASE


def _makers() -> Any:
    """The makers of the runtime tests; conftest files cannot be imported by name."""
    path = Path(__file__).parent.parent / "runtime" / "conftest.py"
    spec = importlib.util.spec_from_file_location("runtime_makers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


_MAKERS = _makers()


def luts_of(model: Any, seed: int, part: int = 1) -> dict[str, torch.Tensor]:
    """Every `part`-th LUT of a model, moved at random."""
    generator = torch.Generator().manual_seed(seed)
    base = base_of(model)
    made = {}
    for number, name in enumerate(base.paths):
        lut = base.module(model, name).lut_of(BASE).detach()
        noise = 0.05 * torch.randn(lut.shape, generator=generator)
        if number % part == 0:
            made[name] = (lut.float() + noise).to(lut.dtype)
    return made


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """`folder(kind, **options)`: the path of a tiny sketch, written once."""
    made: dict[str, Path] = {}
    where = tmp_path_factory.mktemp("sketches")

    def write(kind: str = "LlamaForCausalLM", changes: Any = None, **options: Any) -> Path:
        key = repr((kind, changes, sorted(options.items())))
        if key not in made:
            path = where / f"{len(made)}.sktch"
            _MAKERS.write(_MAKERS.build(kind, **(changes or {})), path, **options)
            made[key] = path
        return made[key]

    return write


@pytest.fixture
def model(folder):
    """A llama of which embeddings, tied head and linears are sketched."""
    path = folder(changes={"tie_word_embeddings": True}, groups=2, embeddings=True, bits=4)
    return sketchconv.load(path)


@pytest.fixture
def ids():
    """Four sequences of six tokens."""
    return torch.randint(3, 90, (4, 6), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="session")
def luts():
    """`luts(model, seed, part)`: an adapter of a model."""
    return luts_of
