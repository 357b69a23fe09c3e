"""Shaped sketches as GGUF: the same weights to the last bit, in the blocks of the type."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from sketchconv.export.recipe import ExportRecipe, TypeChoice
from sketchconv.export.run import export_gguf
from sketchconv.formats import grids
from sketchconv.formats.reader import SktchModel
from sketchconv.kernels.ggml.shaped import GRIDS, key_of
from sketchconv.pipeline import convert
from sketchconv.recipe import Override, Recipe, SketchSpec

NAMES = {
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FORMS = [(grid, bits) for grid, known in grids.GRIDS.items() for bits in known.bits]


def sketched(models, folder, kind, **spec):
    out = folder / f"{kind}.sktch"
    convert(models(kind), out, Recipe(SketchSpec(**spec), weighting="equal"))
    return out


def weights_of(path):
    """Type and values of each tensor of a GGUF file, dequantized by gguf-py."""
    return {
        t.name: (t.tensor_type.name, gguf.quants.dequantize(t.data, t.tensor_type))
        for t in gguf.GGUFReader(path).tensors
    }


def same_bits(one, other):
    return np.array_equal(one.view(np.uint32), np.ascontiguousarray(other).view(np.uint32))


@pytest.mark.parametrize(("grid", "bits"), FORMS)
def test_blocks_hold_the_sketch_bit_for_bit(models, tmp_path, grid, bits):
    kind = GRIDS[key_of(grid, bits)].kind
    sketch = sketched(models, tmp_path, "llama", grid=grid, bits=bits)
    export_gguf(sketch, tmp_path / "out.gguf")
    found = weights_of(tmp_path / "out.gguf")
    with SktchModel.open(sketch) as model:
        for layer in (0, 1):
            for ours, theirs in NAMES.items():
                type_, values = found[f"blk.{layer}.{theirs}.weight"]
                assert type_ == kind
                assert same_bits(values, model.decode(f"model.layers.{layer}.{ours}.weight"))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3", "gemma2", "llama-untied"])
def test_rows_move_with_their_scales(models, tmp_path, kind):
    """The rotary order of q and k, fused weights, and all others: the same as of exact F32."""
    sketch = sketched(models, tmp_path, kind, grid="affine")
    export_gguf(sketch, tmp_path / "own.gguf")
    export_gguf(sketch, tmp_path / "exact.gguf", ExportRecipe("F32"))
    own, exact = weights_of(tmp_path / "own.gguf"), weights_of(tmp_path / "exact.gguf")
    assert own.keys() == exact.keys()
    for name, (type_, values) in own.items():
        assert exact[name][0] == "F32"
        assert same_bits(values, exact[name][1]), name
        if name.startswith("blk.") and values.ndim == 2:
            assert type_ == "Q4_1", name


def test_wide_groups_repeat_their_scale(models, tmp_path):
    sketch = tmp_path / "wide.sktch"
    overrides = (Override("*.down_proj", grid="free"),)
    recipe = Recipe(SketchSpec(grid="symmetric", group_size=64), overrides=overrides)
    convert(models("llama"), sketch, recipe)
    export_gguf(sketch, tmp_path / "own.gguf")
    export_gguf(sketch, tmp_path / "exact.gguf", ExportRecipe("F32"))
    own, exact = weights_of(tmp_path / "own.gguf"), weights_of(tmp_path / "exact.gguf")
    assert own["blk.0.ffn_up.weight"][0] == "Q4_0"
    assert own["blk.0.ffn_down.weight"][0] == "F16"
    assert all(same_bits(own[name][1], exact[name][1]) for name in own)


def test_types_that_are_asked_for_decide(models, tmp_path):
    sketch = sketched(models, tmp_path, "llama", grid="iq4_nl")
    choices = (TypeChoice("ffn_up", "Q8_0"),)
    export_gguf(sketch, tmp_path / "own.gguf", ExportRecipe("IQ4_NL", choices))
    export_gguf(sketch, tmp_path / "exact.gguf")
    own, exact = weights_of(tmp_path / "own.gguf"), weights_of(tmp_path / "exact.gguf")
    assert own["blk.0.ffn_up.weight"][0] == "Q8_0"
    assert own["token_embd.weight"][0] == "Q8_0"
    assert exact["token_embd.weight"][0] == "F32"
    assert own["blk.0.attn_q.weight"][0] == exact["blk.0.attn_q.weight"][0] == "IQ4_NL"
    assert same_bits(own["blk.0.attn_q.weight"][1], exact["blk.0.attn_q.weight"][1])


def test_threads_do_not_change_the_file(models, tmp_path):
    sketch = sketched(models, tmp_path, "llama", grid="iq4_nl")
    for threads in (1, 3):
        export_gguf(sketch, tmp_path / f"{threads}.gguf", threads=threads)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "3.gguf").read_bytes()


def test_a_dense_folder_holds_the_decoded_weights(models, tmp_path):
    from safetensors.numpy import load_file

    from sketchconv.export.dense import prepare_dense
    from sketchconv.export.folder import run_folder

    sketch = sketched(models, tmp_path, "llama", grid="affine")
    run_folder(prepare_dense(sketch, tmp_path / "dense", "F32"))
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    with SktchModel.open(sketch) as model:
        for name in model.manifest.sketches:
            assert same_bits(dense[name], model.decode(name))
