"""What the tests of exports share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# Test folders are no packages (see the notes on the name `kernels`), so helpers are found so.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folder of a model by kind, made once; read only."""
    from tiny import make_model

    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            # llama.cpp asks for certain tokens where a model's name says phi3.
            name = f"tiny-{kind}".replace("phi3", "fi")
            made[kind] = make_model(tmp_path_factory.mktemp("model") / name, kind)
        return made[kind]

    return get
