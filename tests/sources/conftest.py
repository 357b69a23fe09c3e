"""Small checkpoints for the tests of sources, architecture and moments."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

# Test folders are no packages; the tiny models of exports are those of sources too.
sys.path.append(str(Path(__file__).parent.parent / "export"))
sys.path.append(str(Path(__file__).parent))

Arrays = Mapping[str, np.ndarray]
MakeFolder = Callable[..., Path]

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8}


def arrays(*names: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(len(names))
    return {name: rng.standard_normal((4, 8)).astype(np.float32) for name in names}


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Write a model folder: one file, or shards with an index if `shards` is given."""

    def make(
        shards: Mapping[str, Arrays] | None = None,
        *,
        config: dict[str, Any] | None = None,
        name: str = "tiny-model",
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
        if shards is None:
            save_file(arrays("a.weight", "b.weight"), folder / "model.safetensors")
            return folder
        for shard, tensors in shards.items():
            save_file(dict(tensors), folder / shard)
        weight_map = {tensor: shard for shard, tensors in shards.items() for tensor in tensors}
        write_index(folder, weight_map)
        return folder

    return make


def write_index(folder: Path, weight_map: Mapping[str, Any]) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": dict(weight_map)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def two_shards(make_folder: MakeFolder) -> Path:
    return make_folder(
        {
            "model-00001-of-00002.safetensors": arrays("a.weight"),
            "model-00002-of-00002.safetensors": arrays("b.weight", "c.weight"),
        }
    )


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model by kind, made once; read only."""
    from tiny import make_model

    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            # llama.cpp asks for certain tokens where a model's name says phi3.
            name = f"tiny-{kind}".replace("phi3", "fi")
            made[kind] = make_model(tmp_path_factory.mktemp("model") / name, kind)
        return made[kind]

    return get
