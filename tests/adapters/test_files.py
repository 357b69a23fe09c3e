"""Adapters from delta files: bound to the base that is loaded."""

from __future__ import annotations

import pytest
import torch

import sketchconv
from sketchconv.adapters.base import base_of
from sketchconv.deltas import create
from sketchconv.errors import AdapterError, DeltaError, FormatError


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


@pytest.mark.parametrize("form", ["task.sktch", "task"])
def test_a_delta_is_loaded_as_its_luts_are(model, luts, ids, tmp_path, form):
    given = luts(model, 1, part=3)
    create(model.name_or_path, given, tmp_path / form)
    model.load_adapter(given, "memory")
    expected = logits(model, ids)
    done = model.load_adapter(str(tmp_path / form), "file")
    assert sorted(done.weights) == sorted(given)
    assert torch.equal(logits(model, ids), expected)


def test_a_model_that_transformers_loaded_takes_deltas(model, luts, ids, tmp_path):
    from transformers import AutoModelForCausalLM

    create(model.name_or_path, luts(model, 1), tmp_path / "task.sktch")
    model.save_pretrained(tmp_path / "folder")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    model.load_adapter(tmp_path / "task.sktch", "a")
    other.load_adapter(tmp_path / "task.sktch", "a")
    assert torch.equal(logits(model, ids), logits(other, ids))


def test_another_base_is_refused(model, luts, tmp_path, folder):
    path = tmp_path / "task.sktch"
    create(model.name_or_path, luts(model, 1), path)
    other = sketchconv.load(folder(groups=1, changes={"tie_word_embeddings": True}))
    with pytest.raises(DeltaError, match="was not made for"):
        other.load_adapter(path, "a")
    assert other.active_adapters() == []


def test_a_base_that_was_trained_since_is_refused(model, luts, tmp_path):
    path = tmp_path / "task.sktch"
    given = luts(model, 1)
    create(model.name_or_path, given, path)
    module = base_of(model).module(model, next(iter(given)))
    with torch.no_grad():
        module.sketch_lut.view(-1)[5] += 1
    with pytest.raises(DeltaError, match="digest"):
        model.load_adapter(path, "a")


def test_a_damaged_or_missing_delta_is_refused(model, luts, tmp_path):
    path = tmp_path / "task.sktch"
    create(model.name_or_path, luts(model, 1), path)
    data = bytearray(path.read_bytes())
    data[-40] ^= 4
    path.write_bytes(data)
    with pytest.raises((DeltaError, FormatError)):
        model.load_adapter(path, "a")
    with pytest.raises(AdapterError, match="no such delta"):
        model.load_adapter(tmp_path / "none.sktch", "a")
    assert model.active_adapters() == []
