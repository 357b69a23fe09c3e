"""From GGUF metadata to a `config.json` for transformers; what is not understood is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from sketchconv.errors import ArchitectureError
from sketchconv.sources.gguf_header import GgufHeader
from sketchconv.sources.gguf_metadata import Metadata
from sketchconv.sources.gguf_names import GgufArchitecture
from sketchconv.sources.gguf_rope import ROPE_KEYS, long_rope, plain_rope

_COMMON: Final = frozenset(
    {
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "vocab_size",
        "attention.head_count",
        "attention.head_count_kv",
        "tensor_data_layout",
    }
)
_DECODER: Final = (
    _COMMON
    | ROPE_KEYS
    | {"attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon"}
)
_WINDOW: Final = frozenset({"attention.sliding_window", "attention.sliding_window_pattern"})
_SPECIAL_TOKENS: Final = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
WIDE_LAYERS: Final = {"gemma2": 46, "gemma3": 62}
"""Layers of the models whose attention is scaled by hidden / heads instead of the head's size."""
PERIODS: Final = {"gemma2": 2, "gemma3": 6}
"""Every so many layers the last one attends to everything, the others to a window."""


def build_config(
    header: GgufHeader,
    arch: GgufArchitecture,
    where: str,
    factors: Mapping[str, tuple[float, ...]],
    dtype: str = "bfloat16",
) -> dict[str, Any]:
    """The config of the model in transformers' terms.

    Args:
        header: the file's metadata and tensor table.
        arch: its architecture.
        where: the file's name, for errors.
        factors: the values of the tensors of rotary factors that the file has, by name.
        dtype: that the config names.

    Raises:
        ArchitectureError: a key is missing, or asks for something that is not understood.
    """
    metadata = Metadata(header, arch.name, where, factors)
    config: dict[str, Any] = {
        "architectures": [arch.model_class],
        "model_type": arch.model_type,
        "dtype": dtype,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "vocab_size": _vocabulary(header, where),
        # Else transformers takes the number that its family usually has.
        "pad_token_id": None,
        **_BUILDERS[arch.name](metadata),
    }
    for key, source in _SPECIAL_TOKENS.items():
        value = header.values.get(source)
        known = isinstance(value, int) and not isinstance(value, bool)
        if known and 0 <= value < config["vocab_size"]:  # type: ignore[operator]
            config[key] = value
    return config


def _vocabulary(header: GgufHeader, where: str) -> int:
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ArchitectureError(f"{where}: no two-dimensional token_embd.weight")
    return embedding.shape[0]


def _sizes(metadata: Metadata) -> dict[str, Any]:
    """What all decoders with RMSNorm and rotary positions share."""
    hidden = metadata.integer("embedding_length")
    heads = metadata.integer("attention.head_count")
    head_dim = metadata.integer("attention.key_length", max(hidden // heads, 1))
    value_length = metadata.integer("attention.value_length", head_dim)
    if head_dim != value_length:
        raise metadata.fail(
            f"key length {head_dim} and value length {value_length} differ, which is not supported"
        )
    return {
        "hidden_size": hidden,
        "intermediate_size": metadata.integer("feed_forward_length"),
        "num_hidden_layers": metadata.integer("block_count"),
        "max_position_embeddings": metadata.integer("context_length"),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
    }


def _decoder(metadata: Metadata) -> dict[str, Any]:
    """Sizes of a decoder that rotates whole heads."""
    sizes = _sizes(metadata)
    rotary = metadata.integer("rope.dimension_count", sizes["head_dim"])
    if rotary != sizes["head_dim"]:
        raise metadata.fail(
            f"key length {sizes['head_dim']} and rotary dimensions {rotary} differ, which is not"
            " supported"
        )
    return sizes


def _llama(metadata: Metadata) -> dict[str, Any]:
    config = _qwen(metadata)
    config["attention_bias"] = "blk.0.attn_q.bias" in metadata.tensors
    config["mlp_bias"] = "blk.0.ffn_up.bias" in metadata.tensors
    return config


def _qwen(metadata: Metadata) -> dict[str, Any]:
    metadata.refuse_unknown(_DECODER)
    sizes = _decoder(metadata)
    rope = plain_rope(metadata, sizes["head_dim"])
    return {**sizes, "hidden_act": "silu", "rope_parameters": rope}


def _gemma(metadata: Metadata, understood: frozenset[str]) -> dict[str, Any]:
    metadata.refuse_unknown(_DECODER | _WINDOW | understood)
    sizes = _decoder(metadata)
    layers, name = sizes["num_hidden_layers"], metadata.prefix
    period = metadata.integer("attention.sliding_window_pattern", PERIODS[name])
    wide = layers == WIDE_LAYERS[name]
    if layers > len(metadata.tensors):
        raise metadata.fail(f"{name}.block_count is {layers}, more than there are tensors")
    return {
        **sizes,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": (
            sizes["hidden_size"] // sizes["num_attention_heads"] if wide else sizes["head_dim"]
        ),
        "sliding_window": metadata.integer("attention.sliding_window"),
        "layer_types": [
            "sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)
        ],
    }


def _gemma2(metadata: Metadata) -> dict[str, Any]:
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    config = _gemma(metadata, frozenset(caps))
    config["rope_parameters"] = plain_rope(metadata, config["head_dim"])
    config.update({key: metadata.number(key, usual) for key, usual in caps.items()})
    return config


def _gemma3(metadata: Metadata) -> dict[str, Any]:
    config = _gemma(metadata, frozenset({"final_logit_softcapping", "rope.freq_base_swa"}))
    config["rope_parameters"] = {
        "full_attention": plain_rope(metadata, config["head_dim"]),
        "sliding_attention": {
            "rope_type": "default",
            "rope_theta": metadata.number("rope.freq_base_swa", 10000.0),
        },
    }
    capped = metadata.get("final_logit_softcapping")
    config["final_logit_softcapping"] = (
        metadata.number("final_logit_softcapping") if capped else None
    )
    return config


def _phi3(metadata: Metadata) -> dict[str, Any]:
    metadata.refuse_unknown(_DECODER | {"attention.sliding_window", "rope.scaling.attn_factor"})
    config = _sizes(metadata)
    head_dim, length = config.pop("head_dim"), config["max_position_embeddings"]
    if head_dim * config["num_attention_heads"] != config["hidden_size"]:
        raise metadata.fail(f"heads of {head_dim} do not fill the width {config['hidden_size']}")
    rotary = metadata.integer("rope.dimension_count", head_dim)
    if rotary > head_dim:
        raise metadata.fail(f"{rotary} rotary dimensions, but a head has {head_dim}")
    rope = {**long_rope(metadata, rotary), "partial_rotary_factor": rotary / head_dim}
    window = metadata.get("attention.sliding_window")
    return {
        **config,
        "hidden_act": "silu",
        "original_max_position_embeddings": metadata.integer(
            "rope.scaling.original_context_length", length
        ),
        "rope_parameters": rope,
        # Zero stands for none.
        "sliding_window": metadata.integer("attention.sliding_window") if window else None,
    }


def _gpt2(metadata: Metadata) -> dict[str, Any]:
    metadata.refuse_unknown(_COMMON | {"attention.layer_norm_epsilon"})
    hidden, heads = metadata.integer("embedding_length"), metadata.integer("attention.head_count")
    if metadata.integer("attention.head_count_kv", heads) != heads:
        raise metadata.fail("gpt2 with fewer heads of keys than of queries is not supported")
    inner = metadata.integer("feed_forward_length")
    return {
        "activation_function": "gelu_new",
        "n_embd": hidden,
        "n_head": heads,
        "n_inner": None if inner == 4 * hidden else inner,
        "n_layer": metadata.integer("block_count"),
        "n_positions": metadata.integer("context_length"),
        "layer_norm_epsilon": metadata.number("attention.layer_norm_epsilon"),
    }


_BUILDERS: Final[Mapping[str, Callable[[Metadata], dict[str, Any]]]] = {
    "llama": _llama,
    "qwen2": _qwen,
    "qwen3": _qwen,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "gpt2": _gpt2,
}
