"""What an importer refuses: each by name, before anything is written."""

from __future__ import annotations

import json

import peer_layouts as peers
import pytest
import torch
from imported import checkpoint, decode, quantize, tiny_llama, write_folder

import sketchconv
from sketchconv.errors import FormatError, SourceError, WeightError
from sketchconv.importers.base import ImportOptions

ANYPREC = {"anyprec": {"seed_precision": 3, "parent_precision": 4, "group_count": 1}}
# Settings, config and tensors of one good module of each peer.
GOOD = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32}, {}, peers.gptq(32, 64)[0]),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32}, {}, peers.awq(32, 64)[0]),
    "bnb": ({}, {}, peers.bits_and_bytes(32, 64, nested=8)[0]),
    "lean": ({}, {}, peers.lean_quant(32, 64)[0]),
    "squeeze": ({}, {}, peers.squeeze_llm(32, 64)[0]),
    "anyprec": ({}, ANYPREC, peers.any_precision(32, 64, 4, parent=4)[0]),
}
CASES = [(peer, leaf) for peer, (_, _, tensors) in GOOD.items() for leaf in tensors]


def broken(tmp_path, peer, change, **settings):
    quantization, config, tensors = GOOD[peer]
    changed = {f"m.{leaf}": tensor for leaf, tensor in change(dict(tensors)).items()}
    return checkpoint(tmp_path / "m.safetensors", changed, {**quantization, **settings}, config)


def refused(found, match):
    with pytest.raises(SourceError, match=match):
        decode(found)


# Without these a module is not known as quantized, and its weight is missing from the model.
NAMING = ("qweight", "weight.quant_state.bitsandbytes__nf4")


@pytest.mark.parametrize(
    ("peer", "leaf"),
    [c for c in CASES if c[1] != "g_idx" and (c[1] not in NAMING or c[0] == "squeeze")],
)
def test_a_missing_tensor(tmp_path, peer, leaf):

    def change(tensors):
        del tensors[leaf]
        return {**tensors, **{f"o.{n}": t.clone() for n, t in GOOD[peer][2].items()}}

    if leaf == "weight.nested_absmax":
        refused(broken(tmp_path, peer, change), r"m\.weight\.absmax: dtype U8, expected F32")
    else:
        refused(broken(tmp_path, peer, change), rf"no tensor 'm\.{leaf}'")


def test_a_module_without_the_tensor_that_names_it(tmp_path):
    model = tiny_llama()
    tensors, _ = quantize(model, lambda o, w, s: peers.gptq(o, w, seed=s))
    del tensors["model.layers.1.mlp.up_proj.qweight"]
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    source = write_folder(tmp_path / "peer", model, tensors, quantization_config=settings)
    with pytest.raises(SourceError, match=r"lacks: model\.layers\.1\.mlp\.up_proj\.weight"):
        sketchconv.convert(source, tmp_path / "m.sktch")


@pytest.mark.parametrize(("peer", "leaf"), CASES)
def test_a_wrong_dtype(tmp_path, peer, leaf):
    wrong = {**GOOD[peer][2]}[leaf].to(torch.float64)
    found = broken(tmp_path, peer, lambda tensors: {**tensors, leaf: wrong})
    refused(found, rf"m\.{leaf}: (dtype F64, expected|\d+ bytes, but 4 bits)")


@pytest.mark.parametrize(("peer", "leaf"), CASES)
def test_a_wrong_shape(tmp_path, peer, leaf):
    """One row too few, and one axis too many."""
    good = GOOD[peer][2][leaf]
    shapes = [good[1:], good[None, None]]
    if (peer, leaf) == ("bnb", "weight"):
        shapes.pop()  # A list of bytes, whatever its axes.
    if (peer, leaf) == ("squeeze", "qweight"):
        shapes[0] = good[:, 1:]  # With fewer words it is that of another model.
    for wrong in shapes:
        found = broken(tmp_path, peer, lambda tensors, w=wrong: {**tensors, leaf: w})
        refused(found, r"m(\.|:)")


def test_a_cut_file(tmp_path):
    model = tiny_llama()
    tensors, _ = quantize(model, lambda o, w, s: peers.lean_quant(o, w, seed=s))
    source = write_folder(tmp_path / "peer", model, tensors)
    data = (source / "model.safetensors").read_bytes()
    for size in (0, 7, 100, len(data) - 1):
        (source / "model.safetensors").write_bytes(data[:size])
        with pytest.raises((SourceError, FormatError)):
            sketchconv.convert(source, tmp_path / "m.sktch")
        assert [p.name for p in tmp_path.iterdir()] == ["peer"]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"checkpoint_format": "marlin"}, "in the format 'marlin'"),
        ({"checkpoint_format": "gptq_p"}, "in the format 'gptq_p'"),
    ],
)
def test_other_formats_of_gptq(tmp_path, settings, match):
    refused(broken(tmp_path, "gptq", lambda tensors: tensors, **settings), match)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"version": "gemv"}, "in the layout 'gemv'"),
        ({"version": "marlin"}, "in the layout 'marlin'"),
        ({"bits": 3}, "AWQ of 3 bits"),
        ({"group_size": 64}, "groups of 32 columns, but the config says 64"),
    ],
)
def test_other_layouts_of_awq(tmp_path, settings, match):
    refused(broken(tmp_path, "awq", lambda tensors: tensors, **settings), match)


def test_scales_of_an_activation(tmp_path):
    def change(tensors):
        return {**tensors, "act.scales": torch.ones(8).half()}

    refused(broken(tmp_path, "awq", change), r"m\.act\.scales: scales of an activation")


@pytest.mark.parametrize("leaf", ["rows", "vals", "full_rows"])
def test_a_sparse_part(tmp_path, leaf):
    def change(tensors):
        return {**tensors, leaf: torch.ones(3)}

    refused(broken(tmp_path, "squeeze", change), rf"m\.{leaf}: a dense-and-sparse weight")


def test_eight_bits_of_bitsandbytes(tmp_path):
    def change(tensors):
        return {**tensors, "SCB": torch.ones(32)}

    refused(broken(tmp_path, "bnb", change), r"m\.SCB: bitsandbytes of 8 bits")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"quant_type": "int4"}, "quant_type 'int4'"),
        ({"blocksize": 48}, "blocks of 48"),
        ({"dtype": "float8"}, "'float8' are unknown"),
        ({"shape": [32, 64, 1]}, "two positive integers"),
        ({"shape": [32, -64]}, "two positive integers"),
        ({"shape": [64, 33]}, "an odd number"),
        ({"shape": [32, 66]}, r"1024 bytes, but 4 bits of \[32, 66\] take 1056"),
        ({"nested_blocksize": 0}, "nested_blocksize 0"),
        ({"nested_offset": None}, "nested_offset None"),
    ],
)
def test_a_strange_state_of_bitsandbytes(tmp_path, change, match):
    name = "weight.quant_state.bitsandbytes__nf4"

    def altered(tensors):
        state = {**json.loads(bytes(tensors[name].tolist())), **change}
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return {**tensors, name: text}

    refused(broken(tmp_path, "bnb", altered), match)


def test_other_levels_of_bitsandbytes(tmp_path):
    def change(tensors):
        return {**tensors, "weight.quant_map": tensors["weight.quant_map"].flip(0)}

    refused(broken(tmp_path, "bnb", change), r"m\.weight\.quant_map: not the levels of nf4")


def test_a_table_that_is_not_finite(tmp_path):
    model, name = tiny_llama(), "model.layers.1.mlp.up_proj"
    tensors, _ = quantize(model, lambda o, w, s: peers.lean_quant(o, w, seed=s))
    tensors[f"{name}.quant_grid"][5, 3] = float("nan")
    source = write_folder(tmp_path / "peer", model, tensors)
    with pytest.raises(WeightError, match=rf"{name}\.weight: the tables of row 5"):
        sketchconv.convert(source, tmp_path / "m.sktch")
    assert [p.name for p in tmp_path.iterdir()] == ["peer"]


def test_quantized_settings_without_quantized_tensors(tmp_path):
    model = tiny_llama()
    settings = {"quant_method": "gptq", "bits": 4}
    tensors = dict(model.state_dict())
    source = write_folder(tmp_path / "peer", model, tensors, quantization_config=settings)
    with pytest.raises(SourceError, match=r"already quantized .quant_method 'gptq'.*the original"):
        sketchconv.convert(source, tmp_path / "m.sktch")


def test_a_weight_that_is_dense_and_quantized(tmp_path):
    model, name = tiny_llama(), "model.layers.0.mlp.up_proj.weight"
    dense = model.state_dict()[name]
    tensors, _ = quantize(model, lambda o, w, s: peers.lean_quant(o, w, seed=s))
    source = write_folder(tmp_path / "peer", model, {**tensors, name: dense})
    with pytest.raises(SourceError, match=rf"{name}: stored both dense and quantized"):
        sketchconv.convert(source, tmp_path / "m.sktch")


def test_a_checkpoint_of_another_model(tmp_path):
    """The shapes of the config and of the quantized weights must agree."""
    model = tiny_llama()
    tensors, _ = quantize(model, lambda o, w, s: peers.lean_quant(o, w, seed=s))
    base = write_folder(tmp_path / "base", model, None, intermediate_size=128)
    source = write_folder(tmp_path / "peer", model, tensors) / "model.safetensors"
    with pytest.raises(SourceError, match=r"has the shape \[64, 96\].* asks for \[64, 128\]"):
        sketchconv.convert(source, tmp_path / "m.sktch", imports=ImportOptions(base))
