"""What the tests of projections share: a tiny model, its fine-tune, its sketch, and a delta."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

# Test folders are no packages (see the notes on the name `kernels`), so helpers are found so.
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parent.parent / "export"))

from fine_tunes import Trio, noise, retuned

import sketchconv
from sketchconv.recipe import Recipe, SketchSpec


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Trio:
    from tiny import make_model

    root = tmp_path_factory.mktemp("llama")
    dense = make_model(root / "dense", "llama")
    tuned = retuned(dense, root / "tuned", noise())
    base = root / "base.sktch"
    sketchconv.convert(dense, base, Recipe(SketchSpec(3, 2)))
    return Trio(dense, tuned, base)


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    generator = random.Random(1)
    words = ["".join(generator.choices("abcdefghij", k=generator.randint(1, 6))) for _ in range(60)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(generator.choices(words, k=3000)), encoding="utf-8")
    return path


@pytest.fixture
def delta(llama, tmp_path) -> Path:
    """A delta of the fine-tune."""
    from sketchconv.deltas import create
    from sketchconv.projection.extract import Extraction

    path = tmp_path / "task.sktch"
    with Extraction(llama.base, llama.tuned, llama.dense) as work:
        luts = dict(work.luts())
    create(llama.base, luts, path)
    return path
