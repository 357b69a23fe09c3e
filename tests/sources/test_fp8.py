"""Checkpoints of 8-bit floats are read as code times scale, and refused where that is not sure."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from fp8_layouts import CODES, KINDS, make_fp8, settings, write
from safetensors.torch import load_file
from tiny import make_model

from sketchconv.errors import ResumeError, SourceError, Suspended, WeightError
from sketchconv.export.dense import export_dense
from sketchconv.export.recipe import ExportRecipe
from sketchconv.export.run import export_gguf
from sketchconv.pipeline import convert
from sketchconv.sources.open import open_source

WAYS = ("convert the ", "download it again", "remove it from config.json")
UP = "model.layers.0.mlp.up_proj."


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    root = tmp_path_factory.mktemp("fp8")
    # 160 columns and rows: no multiple of 128, nor of the odd blocks.
    return make_model(root / "dense", "llama", intermediate_size=160)


def read(source, name, step=None):
    height = source.infos[name].shape[0] if source.infos[name].shape else 1
    step = step or height
    pieces = [source.rows(name, at, min(at + step, height)) for at in range(0, height, step)]
    values = [source.float32(name, raw) for raw in pieces]
    return b"".join(pieces), np.concatenate([np.atleast_1d(v) for v in values])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_values_are_code_times_scale_however_they_are_read(dense, tmp_path, kind, dtype):
    values = make_fp8(dense, tmp_path / "m", kind, dtype)
    with open_source(str(tmp_path / "m")) as source:
        assert source.infos.keys() == values.keys()
        for name, expected in values.items():
            whole, found = read(source, name)
            np.testing.assert_array_equal(found, expected.float().numpy(), name)
            assert read(source, name, 7)[0] == whole  # digests do not depend on chunks
            assert source.infos[name].dtype == "F32"
            assert source.stored(name, whole) == found.tobytes()
        assert "quantization_config" not in source.config()
        assert "quantization_config" not in json.loads(source.files()["config.json"])


def test_an_interrupted_conversion_sees_another_block_size(dense, tmp_path):
    """Both give two scales for 160 columns, and other values."""
    make_fp8(dense, tmp_path / "m")

    def stop(event):
        if event.name == "model.norm.weight":
            raise KeyboardInterrupt

    with pytest.raises(Suspended):
        convert(tmp_path / "m", tmp_path / "m.sktch", progress=stop)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    write(dense, tmp_path / "m", tensors, changed("blocks", weight_block_size=[128, 96]))
    with pytest.raises(ResumeError, match=r"down_proj\.weight: the source has other values"):
        convert(tmp_path / "m", tmp_path / "m.sktch")


def test_all_outputs_are_those_of_the_dense_values(dense, tmp_path):
    from safetensors.torch import save_file

    values = make_fp8(dense, tmp_path / "fp8", "odd blocks")
    (tmp_path / "plain").mkdir()
    save_file(values, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    for path in dense.iterdir():
        if path.name != "model.safetensors":
            (tmp_path / "plain" / path.name).write_bytes(path.read_bytes())
    made = {}
    for name in ("fp8", "plain"):
        out = tmp_path / f"out-{name}"
        out.mkdir()
        convert(tmp_path / name, out / "s")
        export_dense(tmp_path / name, out / "d")
        export_gguf(tmp_path / name, out / "q.gguf", ExportRecipe("Q8_0", name="m"))
        made[name] = (
            load_file(out / "s" / "model.safetensors"),
            load_file(out / "d" / "model.safetensors"),
            gguf_tensors(out / "q.gguf"),
        )
    for ours, plain in zip(made["fp8"], made["plain"], strict=True):
        assert ours.keys() == plain.keys()
        assert all(np.array_equal(ours[name], plain[name]) for name in ours)


def gguf_tensors(path):
    import gguf

    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}


def test_nan_is_named(dense, tmp_path):
    make_fp8(dense, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors[f"{UP}weight"].view(torch.uint8)[3, 5] = 0x7F
    write(dense, tmp_path / "m", tensors, settings("blocks"))
    with pytest.raises(WeightError, match=f"{UP}weight.*row 3"):
        convert(tmp_path / "m", tmp_path / "m.sktch")


def without(tensors):
    del tensors[f"{UP}weight_scale_inv"]


def cut(tensors):
    tensors[f"{UP}weight_scale_inv"] = tensors[f"{UP}weight_scale_inv"][:-1].clone()


def turned(tensors):
    scales = tensors["model.layers.0.self_attn.k_proj.weight_scale_inv"]
    tensors["model.layers.0.self_attn.k_proj.weight_scale_inv"] = scales.T.repeat(2, 1).clone()


def powers(tensors):
    scales = tensors[f"{UP}weight_scale_inv"]
    tensors[f"{UP}weight_scale_inv"] = scales.to(torch.float8_e8m0fnu)


def other_codes(tensors):
    tensors[f"{UP}weight"] = tensors[f"{UP}weight"].float().to(torch.float8_e5m2)


def dense_again(tensors):
    tensors[f"{UP}weight"] = tensors[f"{UP}weight"].float()


def all_dense(tensors):
    for name in list(tensors):
        if name.endswith("weight_scale_inv"):
            del tensors[name]
        elif tensors[name].dtype == CODES:
            tensors[name] = tensors[name].float()


def zero_points(tensors):
    tensors[f"{UP}weight_zero_point"] = torch.zeros(2, 1)


def fused(tensors):
    tensors["model.layers.0.mlp.experts.up_proj"] = tensors.pop(f"{UP}weight")[None].clone()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (without, f"{UP}weight is F8_E4M3 and needs one tensor of scales, .* found none"),
        (cut, rf"{UP}weight_scale_inv: shape \[1, 1\], expected \[2, 1\]: one scale for 128 x 128"),
        (turned, r"k_proj.weight_scale_inv: shape \[2, 1\], expected \[1, 1\]"),
        (powers, f"{UP}weight_scale_inv: dtype F8_E8M0, expected F32 or BF16 or F16"),
        (other_codes, "holds scales, but .* is not F8_E4M3|is F8_E5M2"),
        (dense_again, f"{UP}weight_scale_inv holds scales, but {UP}weight is not F8_E4M3"),
        (all_dense, "already quantized .* but no tensor is F8_E4M3"),
        (zero_points, f"{UP}weight_zero_point goes with {UP}weight"),
        (fused, r"'model.layers.0.mlp.experts.up_proj' is F8_E4M3 of shape \[1, 160, 64\]"),
    ],
)
def test_what_is_not_sure_is_refused_by_name(dense, tmp_path, harm, message):
    make_fp8(dense, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    harm(tensors)
    write(dense, tmp_path / "m", tensors, settings("blocks"))
    with pytest.raises(SourceError, match=message) as caught:
        open_source(str(tmp_path / "m"))
    assert any(way in str(caught.value) for way in WAYS)


def changed(kind, **values):
    found = json.loads(json.dumps(settings(kind)))
    for key, value in values.items():
        if kind.startswith("compressed") and key in ("num_bits", "type", "strategy"):
            found["config_groups"]["group_0"]["weights"][key] = value
        else:
            found[key] = value
    return found


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (changed("blocks", fmt="e5m2"), "fmt 'e5m2'"),
        (changed("blocks", expert_dtype="fp4"), "expert_dtype 'fp4'"),
        (changed("blocks", weight_block_size=[128]), "must be two positive integers"),
        (changed("blocks", weight_block_size=[0, 128]), "must be two positive integers"),
        (changed("blocks", weight_block_size=[True, 128]), "must be two positive integers"),
        (changed("compressed tensor", format="pack-quantized"), "format 'pack-quantized'"),
        (changed("compressed tensor", num_bits=4), "num_bits 4"),
        (changed("compressed tensor", type="int"), "type 'int'"),
        (changed("compressed tensor", strategy="group"), "strategy 'group'"),
        (changed("compressed tensor", transform_config={"a": 1}), "a transform_config"),
        (changed("compressed tensor", sparsity_config={"format": "24"}), "a sparsity_config"),
        (changed("compressed tensor", config_groups={}), "without config_groups"),
        (changed("compressed tensor", config_groups={"a": None}), "says nothing of weights"),
        ({"quant_method": "fbgemm_fp8"}, "quant_method 'fbgemm_fp8'"),
    ],
)
def test_schemes_that_are_not_known_are_refused_by_name(dense, tmp_path, found, message):
    make_fp8(dense, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    write(dense, tmp_path / "m", tensors, found)
    with pytest.raises(SourceError, match=message) as caught:
        open_source(str(tmp_path / "m"))
    assert any(way in str(caught.value) for way in WAYS)
