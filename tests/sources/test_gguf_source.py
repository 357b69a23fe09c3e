"""GGUF files as sources: names, row order, values, config, refusals."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest

from sketchconv.errors import ArchitectureError, SourceError
from sketchconv.sources.gguf import GgufSource, rotary_rows
from sketchconv.sources.gguf_names import ARCHITECTURES
from sketchconv.sources.open import open_source

torch = pytest.importorskip("torch")

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, FFN, LAYERS, VOCAB = 4, 2, 16, 64, 96, 2, 50
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    module, kind = name.rsplit(".", 1)
    if module in NAMES:
        return f"{NAMES[module]}.{kind}"
    _, _, layer, module = module.split(".", 3)
    return f"blk.{layer}.{NAMES[module]}.{kind}"


def to_pairs(weight, heads):
    """Llama's row order in GGUF: the two halves of each head interleaved."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def write(path, model, arch, kind=None, *, keys=(), change=None):
    """Write a model as llama.cpp's converter does."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    if arch == "llama":
        writer.add_rope_dimension_count(HEAD_DIM)
    else:
        writer.add_key_length(HEAD_DIM)
        writer.add_value_length(HEAD_DIM)
    writer.add_bos_token_id(1)
    for key, value in keys:
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    state = {name: value.float().numpy() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    tensors = {}
    for name, value in state.items():
        if arch == "llama" and ".self_attn.q_proj." in name:
            value = to_pairs(value, HEADS)
        if arch == "llama" and ".self_attn.k_proj." in name:
            value = to_pairs(value, KV_HEADS)
        tensors[gguf_name(name)] = value
    if change is not None:
        change(tensors)
    for name, value in tensors.items():
        if kind is None or value.ndim == 1 or name == "token_embd.weight":
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny(arch, **changes):
    import transformers

    configs = {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
    }
    torch.manual_seed(3)
    config = configs[arch](
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 5000.0, "rope_type": "default"},
        **changes,
    )
    model = getattr(transformers, ARCHITECTURES[arch].model_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases and gains of their own, so that a swap of any two shows.
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def read(source, name):
    return source.float32(name, source.rows(name, 0, source.infos[name].shape[0]))


def logits(model):
    with torch.no_grad():
        return model(torch.arange(2, 30)[None]).logits


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "tie_word_embeddings": False}),
        ("llama", {"mlp_bias": True}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {}),
    ],
)
def test_rebuilt_model_is_the_model_that_was_written(tmp_path, arch, changes):
    import transformers

    model = tiny(arch, **changes)
    source = open_source(str(write(tmp_path / "tiny.gguf", model, arch)))
    config = transformers.CONFIG_MAPPING[arch].from_dict(source.config())
    rebuilt = type(model)(config).eval()
    state = {name: torch.from_numpy(read(source, name).copy()) for name in source.infos}
    missing, unexpected = rebuilt.load_state_dict(state, strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if changes.get("tie_word_embeddings") else [])
    rebuilt.tie_weights()
    assert torch.equal(logits(rebuilt), logits(model))
    assert source.config()["dtype"] == "float32"
    assert source.config()["bos_token_id"] == 1
    source.close()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q5_0", "BF16", "F16"])
def test_values_are_those_of_the_gguf_package(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    model = tiny("llama")
    source = GgufSource(write(tmp_path / "tiny.gguf", model, "llama", kind))
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    for name, info in source.infos.items():
        value = state[name]
        if value.ndim == 2 and "embed" not in name:
            value = gguf.quants.dequantize(gguf.quants.quantize(value, kind), kind)
            assert info.dtype == (kind.name if kind.name in ("BF16", "F16") else "BF16")
        else:
            assert info.dtype == "F32"
        got = read(source, name)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, value)
        stored = source.stored(name, source.rows(name, 0, info.shape[0]))
        assert len(stored) == info.nbytes


def test_stored_bf16_is_rounded_to_nearest(tmp_path):
    model = tiny("llama")
    source = GgufSource(write(tmp_path / "t.gguf", model, "llama", gguf.GGMLQuantizationType.Q8_0))
    name = "model.layers.1.self_attn.k_proj.weight"
    stored = np.frombuffer(source.stored(name, source.rows(name, 0, 32)), np.uint16)
    want = torch.from_numpy(read(source, name).copy()).to(torch.bfloat16).view(torch.int16)
    np.testing.assert_array_equal(stored.view(np.int16), want.numpy().reshape(-1))


def test_permuted_rows_can_be_cut_anywhere(tmp_path):
    source = GgufSource(
        write(tmp_path / "t.gguf", tiny("llama"), "llama", gguf.GGMLQuantizationType.Q4_0)
    )
    for name in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{name}.weight"
        whole = read(source, name)
        for begin in range(len(whole) + 1):
            for end in range(begin, len(whole) + 1):
                part = source.float32(name, source.rows(name, begin, end))
                np.testing.assert_array_equal(part, whole[begin:end])


def test_rotary_rows_invert_the_permutation():
    rows = np.arange(3 * 10)
    stored = to_pairs(rows, 3)
    np.testing.assert_array_equal(stored[rotary_rows(rows, 10)], rows)


def test_infos_and_identity(tmp_path):
    path = write(tmp_path / "some name.gguf", tiny("llama"), "llama")
    source = GgufSource(path)
    assert (source.id, source.revision, source.format) == ("some name.gguf", None, "gguf")
    assert source.paths == (path.resolve(),)
    assert source.nbytes == path.stat().st_size
    source.close()
    with pytest.raises(SourceError, match="closed"):
        source.rows("model.norm.weight", 0, 1)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama3_factors():
    """The factors as transformers computes them: plain over scaled frequencies."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(head_dim=HEAD_DIM, num_attention_heads=HEADS, rope_parameters=LLAMA3)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / 5000.0 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    return (plain / scaled).numpy().astype(np.float32)


def test_llama3_scaling_is_recovered(tmp_path):
    def add(tensors):
        tensors["rope_freqs.weight"] = llama3_factors()

    source = GgufSource(write(tmp_path / "t.gguf", tiny("llama"), "llama", change=add))
    rope = source.config()["rope_parameters"]
    assert rope.pop("rope_type") == LLAMA3["rope_type"]
    assert rope == pytest.approx({k: v for k, v in LLAMA3.items() if k != "rope_type"})
    assert "rope_freqs.weight" not in source.infos


def test_other_frequency_factors_are_refused(tmp_path):
    def add(tensors):
        tensors["rope_freqs.weight"] = llama3_factors() * np.float32(1.01)

    path = write(tmp_path / "t.gguf", tiny("llama"), "llama", change=add)
    with pytest.raises(ArchitectureError, match="not Llama 3's frequency scaling"):
        GgufSource(path)


def test_yarn_and_linear_scaling(tmp_path):
    keys = [
        ("qwen2.rope.scaling.type", "yarn"),
        ("qwen2.rope.scaling.factor", 4.0),
        ("qwen2.rope.scaling.original_context_length", 32768),
    ]
    source = GgufSource(write(tmp_path / "t.gguf", tiny("qwen2"), "qwen2", keys=keys))
    assert source.config()["rope_parameters"] == {
        "rope_theta": 5000.0,
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    }
    keys = [("llama.rope.scaling.type", "linear"), ("llama.rope.scaling.factor", 2.0)]
    source = GgufSource(write(tmp_path / "u.gguf", tiny("llama"), "llama", keys=keys))
    assert source.config()["rope_parameters"]["factor"] == 2.0


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ([("llama.expert_count", 8)], "llama.expert_count = 8 is not understood"),
        ([("llama.attention.sliding_window", 128)], "sliding_window"),
        ([("llama.attention.scale", 0.1)], "attention.scale"),
        ([("llama.rope.scaling.type", "longrope")], "rope scaling 'longrope'"),
        ([("llama.attention.key_length", 8)], "differ, which is not supported"),
        ([("split.count", 3)], "one of 3 parts"),
    ],
)
def test_settings_that_are_not_understood(tmp_path, keys, match):
    path = write(tmp_path / "t.gguf", tiny("llama"), "llama", keys=keys)
    with pytest.raises(SourceError, match=match):
        GgufSource(path)


def test_feature_that_is_switched_off_is_fine(tmp_path):
    path = write(tmp_path / "t.gguf", tiny("llama"), "llama", keys=[("llama.expert_count", 0)])
    assert GgufSource(path).config()["num_attention_heads"] == HEADS


def test_head_counts_per_layer_are_refused(tmp_path):
    path = write(
        tmp_path / "t.gguf", tiny("llama"), "llama", keys=[("llama.attention.key_length", [8, 8])]
    )
    with pytest.raises(ArchitectureError, match="one value per layer"):
        GgufSource(path)


@pytest.mark.parametrize("arch", ["mamba", "gemma3n", "nonsense"])
def test_unsupported_architectures_name_the_supported(tmp_path, arch):
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", arch)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ArchitectureError, match=f"{arch}.*gpt2, llama, phi3"):
        GgufSource(tmp_path / "t.gguf")


def test_unknown_tensor(tmp_path):
    def add(tensors):
        tensors["blk.0.ssm_a.weight"] = np.zeros((2, 2), np.float32)

    with pytest.raises(ArchitectureError, match=r"'blk.0.ssm_a.weight' is unknown"):
        GgufSource(write(tmp_path / "t.gguf", tiny("llama"), "llama", change=add))


def test_cut_off_at_any_place(tmp_path):
    data = write(tmp_path / "whole.gguf", tiny("llama"), "llama").read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [*range(0, 400, 7), *range(400, len(data), 9001), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(SourceError, match=r"cut\.gguf: "):
            GgufSource(path)


def header(*, magic=b"GGUF", version=3, tensors=0, keys=0, rest=b""):
    return struct.pack("<4sIQQ", magic, version, tensors, keys) + rest + bytes(64)


def string(text):
    return struct.pack("<Q", len(text)) + text


KEY = string(b"k")
ARRAY = KEY + struct.pack("<I", 9)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (header(magic=b"GGML"), "not a GGUF file"),
        (header(version=1), "GGUF version 1"),
        (header(version=0x03000000), "big-endian"),
        (header(tensors=1 << 60), "announces"),
        (header(keys=1 << 60), "announces"),
        (header(keys=1, rest=struct.pack("<Q", 1 << 62)), "a string of"),
        (header(keys=1, rest=string(b"\xff") + struct.pack("<I", 4)), "not UTF-8"),
        (header(keys=1, rest=KEY + struct.pack("<I", 77)), "unknown type 77"),
        (header(keys=1, rest=ARRAY + struct.pack("<IQ", 4, 1 << 61)), "past the end"),
        (header(keys=1, rest=ARRAY + struct.pack("<IQ", 8, 1 << 61)), "past the end"),
        (header(keys=1, rest=ARRAY + struct.pack("<IQ", 9, 1)), "unsupported type 9"),
        (header(keys=2, rest=(KEY + struct.pack("<IB", 0, 1)) * 2), "'k' twice"),
        (header(tensors=1, rest=KEY + struct.pack("<I", 9)), "9 dimensions"),
        (header(tensors=1, rest=KEY + struct.pack("<IQIQ", 1, 0, 0, 0)), "empty"),
        (header(tensors=1, rest=KEY + struct.pack("<IQIQ", 1, 1, 0, 3)), "misaligned"),
        (
            header(
                keys=1,
                rest=string(b"general.alignment") + struct.pack("<II", 4, 24),
            ),
            "power of two",
        ),
    ],
)
def test_hostile_headers(tmp_path, data, match):
    (tmp_path / "t.gguf").write_bytes(data)
    with pytest.raises(SourceError, match=match):
        GgufSource(tmp_path / "t.gguf")
