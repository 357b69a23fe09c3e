"""The independent decoder and the dense export write the same tensors of the source."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import sketchconv
from sketchconv.export.dense import export_dense
from sketchconv.recipe import Recipe, SketchSpec
from sketchconv.sources.forms import Forms, part_infos, part_name, turned
from sketchconv.sources.matrices import Matrices
from sketchconv.sources.open import open_source

DECODER = Path(__file__).parents[2] / "spec" / "decode.py"


def decoder(path):
    spec = importlib.util.spec_from_file_location("spec_decode_forms", DECODER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.File(path)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("gpt2", "transformer.h.1.mlp.c_fc.weight"),
        ("mixtral", "model.layers.1.mlp.experts.gate_up_proj"),
    ],
)
@pytest.mark.parametrize("lut", ["F16", "BF16", "F32"])
def test_two_decoders_agree(families, kind, name, lut, tmp_path):
    source, out = families(kind, stacked=kind == "mixtral"), tmp_path / "m.sktch"
    sketchconv.convert(source, out, Recipe(SketchSpec(3, 2, lut_dtype=lut)))
    export_dense(out, tmp_path / "dense", "F32")
    with safe_open(tmp_path / "dense/model.safetensors", "np") as file:
        ours = file.get_tensor(name)
    theirs = np.array([list(row) for row in decoder(out).source_rows(name)], np.float32)
    assert np.array_equal(ours.reshape(theirs.shape), theirs)


def test_rows_of_an_expert(families):
    name = "model.layers.0.mlp.experts.down_proj"
    with open_source(str(families("mixtral", stacked=True))) as source:
        whole = source.float32(name, source.rows(name, 0, 4))
        seen = Matrices(source, Forms(stacked={name: 4}))
        part = part_name(name, 2)
        assert seen.infos[part].shape == (64, 96)
        assert name not in seen.infos
        assert np.array_equal(seen.float32(part, seen.rows(part, 5, 9)), whole[2, 5:9])
        assert turned(seen.infos[part]).shape == (96, 64)
        assert [i.name for i in part_infos(source.infos[name])] == Forms(stacked={name: 4}).parts(
            name
        )


@pytest.mark.parametrize(
    ("forms", "says"),
    [
        (Forms(frozenset({"nothing.weight"})), "expected 2 axes, got no such tensor"),
        (Forms(stacked={"model.layers.0.mlp.experts.down_proj": 3}), r"got shape \[4, 64, 96\]"),
        (Forms(stacked={"model.norm.weight": 64}), r"expected 3 axes, got shape \[64\]"),
    ],
)
def test_a_source_that_is_another_is_refused(families, forms, says):
    from sketchconv.errors import SourceError

    with (
        open_source(str(families("mixtral", stacked=True))) as source,
        pytest.raises(SourceError, match=says),
    ):
        Matrices(source, forms)


def test_verify_against_another_model_finds_out(families, tmp_path):
    """A sketch of stacks against the checkpoint with one tensor for each expert."""
    from sketchconv.errors import SourceError
    from sketchconv.verify import verify

    out = tmp_path / "m.sktch"
    sketchconv.convert(families("mixtral", stacked=True), out, Recipe(SketchSpec(3)))
    with pytest.raises(SourceError, match="no such tensor"):
        verify(out, against=str(families("mixtral")))
