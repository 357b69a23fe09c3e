"""Every type: the file's blocks are those of its reference encoder, and llama.cpp runs them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tiny import VOCABULARY, make_model

from sketchconv.errors import PlanError, RecipeError, WeightError
from sketchconv.export.encoders import ENCODERS, encoder_named, fitting
from sketchconv.export.planner import choose_type
from sketchconv.export.recipe import ExportRecipe, parse_choice
from sketchconv.export.rows import rotary_order
from sketchconv.export.run import export_gguf
from sketchconv.kernels.ggml.blocks import encode_plain
from sketchconv.kernels.ggml.kinds import KINDS

QUANTIZED = [name for name in ENCODERS if name not in ("F32", "F16", "BF16")]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A llama whose rows fit blocks of 256."""
    folder = tmp_path_factory.mktemp("wide") / "wide"
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    return make_model(folder, "llama", **sizes)


def blocks_of(path):
    """Tensors of a GGUF by name: (type, raw bytes, float32 values), read by the `gguf` package."""
    reader = gguf.GGUFReader(path)
    return {
        tensor.name: (
            tensor.tensor_type.name,
            np.asarray(tensor.data).tobytes(),
            gguf.quants.dequantize(tensor.data, tensor.tensor_type),
        )
        for tensor in reader.tensors
    }


def expected_weights(folder):
    """The matrices under their GGUF names and in GGUF's order of rows, another way round."""
    weights = load_file(folder / "model.safetensors")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 8)
    found = {}
    for name, value in weights.items():
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            if part in name:
                halves = value.reshape(heads, 2, -1, *value.shape[1:])
                value = halves.swapaxes(1, 2).reshape(value.shape)
        found[names.get_name(name, (".weight", ".bias"))] = value
    return found


def reference_blocks(kind, value):
    """By our plain encoder, or where we have none by that of the `gguf` package."""
    if kind.name in KINDS and kind.name != "Q4_0":
        return encode_plain(kind.name, np.ascontiguousarray(value, np.float32))
    return gguf.quants.quantize(value, kind)


@pytest.mark.parametrize("name", ENCODERS)
def test_every_block_is_the_reference_encoders(wide, name, tmp_path):
    path = tmp_path / "model.gguf"
    export_gguf(wide, path, ExportRecipe(name, (parse_choice(f"*={name}"),)))
    found, expected = blocks_of(path), expected_weights(wide)
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        kind, raw, values = found[tensor]
        wanted = gguf.GGMLQuantizationType[name if value.ndim > 1 else "F32"]
        quantized = reference_blocks(wanted, value)
        assert kind == wanted.name, tensor
        assert raw == np.ascontiguousarray(quantized).tobytes(), tensor
        assert np.array_equal(values, gguf.quants.dequantize(quantized, wanted)), tensor


@pytest.mark.parametrize("name", QUANTIZED)
def test_llama_cpp_runs_every_type(wide, name, tmp_path):
    pytest.importorskip("xllamacpp")
    from peer import Runtime, prompts

    path = tmp_path / "model.gguf"
    export_gguf(wide, path, ExportRecipe(name))
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(wide, dtype=torch.float32)
    # Replace the weights by those of the file: what remains is the runtime's own rounding.
    state = {k: torch.from_numpy(v[2].copy()) for k, v in blocks_of(path).items()}
    _put(model, state)
    runtime = Runtime(path)
    from peer import divergence, reference

    (tokens,) = prompts(wide, model, (12,))
    expected = reference(model, tokens)
    assert divergence(expected, runtime.log_probabilities(tokens, VOCABULARY)) < 0.02


def _put(model, state):
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = state[names.get_name(name, (".weight",))]
            for part, heads in (("q_proj", 4), ("k_proj", 2)):
                if part in name:
                    order = rotary_order(np.arange(len(value)), len(value) // heads)
                    value = value[np.argsort(order)]
            parameter.copy_(value)


def test_rotary_order_is_the_known_reshape():
    rows = np.arange(96)
    known = rows.reshape(3, 2, 16).swapaxes(1, 2).reshape(-1)
    assert np.array_equal(rotary_order(rows, 32), known)


@pytest.mark.parametrize(
    ("wanted", "columns", "chosen"),
    [
        ("Q8_0", 576, "Q8_0"),
        ("Q8_0", 60, "F16"),
        ("TQ2_0", 576, "Q4_0"),
        ("TQ1_0", 30, "F16"),
        ("Q4_K", 576, "Q5_0"),
        ("Q5_K", 576, "Q5_1"),
        ("Q6_K", 576, "Q8_0"),
        ("Q2_K", 576, "IQ4_NL"),
    ],
)
def test_rows_that_do_not_fit_the_blocks_fall_back_as_in_llama_cpp(wanted, columns, chosen):
    assert fitting(ENCODERS[wanted], columns).type.name == chosen


def test_fallbacks_always_end():
    for encoder in ENCODERS.values():
        assert fitting(encoder, 1).type.block == 1


@pytest.mark.parametrize(
    ("name", "shape", "recipe", "chosen"),
    [
        ("blk.0.attn_norm.weight", (64,), "Q8_0", "F32"),
        ("blk.0.attn_q.bias", (64,), "Q8_0", "F32"),
        ("position_embd.weight", (128, 64), "Q8_0", "F32"),
        ("blk.0.ffn_gate_inp.weight", (8, 64), "Q8_0", "F32"),
        ("token_embd.weight", (300, 64), "Q8_0", "Q8_0"),
        ("token_embd.weight", (300, 64), "Q4_0", "Q8_0"),
        ("output.weight", (300, 64), "Q5_1", "Q8_0"),
        ("output.weight", (300, 64), "F16", "F16"),
        ("blk.0.ffn_up.weight", (300, 64), "Q4_1", "Q4_1"),
        ("blk.0.ffn_up.weight", (300, 64), "AUTO", "BF16"),
    ],
)
def test_types_by_default(name, shape, recipe, chosen):
    encoder, _ = choose_type(name, shape, "BF16", ExportRecipe(recipe))
    assert encoder.type.name == chosen


def test_the_last_pattern_wins_and_names_either_side():
    choices = tuple(map(parse_choice, ("*=Q8_0", "ffn_down=Q4_0", "model.layers.1.*=q5_0")))
    recipe = ExportRecipe("F16", choices)

    def chosen(name, source):
        return choose_type(name, (64, 64), "F32", recipe, source)[0].type.name

    assert chosen("blk.0.ffn_up.weight", "model.layers.0.mlp.up_proj.weight") == "Q8_0"
    assert chosen("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight") == "Q4_0"
    assert chosen("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight") == "Q5_0"


def test_a_pattern_that_names_nothing_is_refused(models, tmp_path):
    for pattern, text in (("ffn_dwon=Q8_0", "no tensor"), ("*_norm=Q8_0", "only vectors")):
        with pytest.raises(PlanError, match=text):
            export_gguf(
                models("llama"), tmp_path / "x.gguf", ExportRecipe("F16", (parse_choice(pattern),))
            )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["Q4_9", "Q4_Z_K", ""])
def test_an_unknown_type_is_refused(text):
    with pytest.raises(RecipeError, match="choose one of"):
        encoder_named(text)


@pytest.mark.parametrize("text", ["Q8_0", "=Q8_0", "ffn_down"])
def test_a_choice_without_a_pattern_is_refused(text):
    with pytest.raises(RecipeError):
        parse_choice(text)


def test_values_beyond_f16_are_refused_by_name(tmp_path):
    folder = make_model(tmp_path / "large", "llama")
    spoil(folder, "model.layers.1.mlp.up_proj.weight", 1e5)
    with pytest.raises(WeightError, match=r"layers\.1\.mlp\.up_proj.*beyond F16"):
        export_gguf(folder, tmp_path / "x.gguf", ExportRecipe("F16"))
    export_gguf(folder, tmp_path / "y.gguf", ExportRecipe("BF16"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["large", "y.gguf"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_by_name_and_row(value, tmp_path):
    folder = make_model(tmp_path / "broken", "llama")
    spoil(folder, "model.layers.0.mlp.down_proj.weight", value)
    with pytest.raises(WeightError, match=r"layers\.0\.mlp\.down_proj.*1 values .* row 5"):
        export_gguf(folder, tmp_path / "x.gguf", ExportRecipe("Q8_0"))
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


def spoil(folder, name, value):
    from safetensors.numpy import save_file

    weights = load_file(folder / "model.safetensors")
    weights[name] = weights[name].copy()
    weights[name][5, 3] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_take_hard_rows(name):
    """Constant rows, zeros, one outlier, tiny values: whole blocks of bytes, finite again."""
    rows = np.zeros((6, 256), np.float32)
    rows[1] = 3.0
    rows[2, 7] = -1000.0
    rows[3] = np.float32(1e-30)
    rows[4] = np.tile([1.0, -1.0], 128)
    rows[5] = np.linspace(-1, 1, 256)
    encoder = ENCODERS[name]
    blocks = encoder.encode(rows)
    assert blocks.dtype == np.uint8
    assert blocks.shape == (6, encoder.type.row_bytes(256))
    back = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    assert np.isfinite(back).all()
    assert not back[0].any()
