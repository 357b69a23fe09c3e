"""From GGUF metadata to a `config.json` for transformers; what is not understood is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sketchconv.errors import ArchitectureError
from sketchconv.sources.gguf_header import GgufArray, GgufHeader, GgufValue
from sketchconv.sources.gguf_names import GgufArchitecture

_UNDERSTOOD = frozenset(
    {
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "vocab_size",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
        "tensor_data_layout",
    }
)
_SPECIAL_TOKENS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}


class _Metadata:
    """Typed access to the keys of one architecture."""

    def __init__(self, header: GgufHeader, arch: GgufArchitecture, where: str) -> None:
        self.values = header.values
        self.prefix = arch.name
        self.where = where

    def fail(self, message: str) -> ArchitectureError:
        return ArchitectureError(f"{self.where}: {message}")

    def get(self, key: str) -> GgufValue | None:
        return self.values.get(f"{self.prefix}.{key}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            shown = "one value per layer" if isinstance(value, GgufArray) else repr(value)
            raise self.fail(f"{self.prefix}.{key} is {shown}; expected one positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, (bool, str, GgufArray)) or value is None or not value > 0:
            raise self.fail(f"{self.prefix}.{key} is {value!r}; expected a positive number")
        # Shortest decimal of the stored float32: 1e-05 rather than 9.999999747378752e-06.
        return float(str(np.float32(value)))


def build_config(
    header: GgufHeader,
    arch: GgufArchitecture,
    where: str,
    rope_factors: Sequence[float] | None = None,
) -> dict[str, Any]:
    """The config of the model in transformers' terms, with dtype bfloat16.

    Args:
        header: the file's metadata and tensor table.
        arch: its architecture.
        where: the file's name, for errors.
        rope_factors: the values of `rope_freqs.weight`, if the file has that tensor.

    Raises:
        ArchitectureError: a key is missing, or asks for something that is not understood.
    """
    metadata = _Metadata(header, arch, where)
    _refuse_unknown(metadata)
    config: dict[str, Any] = {
        "architectures": [arch.model_class],
        "model_type": arch.model_type,
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": metadata.integer("embedding_length"),
        "intermediate_size": metadata.integer("feed_forward_length"),
        "num_hidden_layers": metadata.integer("block_count"),
        "max_position_embeddings": metadata.integer("context_length"),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "vocab_size": _vocabulary(header, where),
    }
    config.update(_attention(metadata, config["hidden_size"]))
    config["rope_parameters"] = _rope(metadata, config["head_dim"], rope_factors)
    if arch.model_type == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors
    for key, source in _SPECIAL_TOKENS.items():
        if source in header.values:
            config[key] = header.values[source]
    return config


def _refuse_unknown(metadata: _Metadata) -> None:
    for key, value in metadata.values.items():
        prefix, _, rest = key.partition(".")
        if prefix != metadata.prefix or rest in _UNDERSTOOD:
            continue
        # Zero and False switch a feature off (an expert count of 0, for instance).
        if isinstance(value, GgufArray) or value:
            raise metadata.fail(
                f"{key} = {value!r} is not understood, and ignoring it could give a wrong model;"
                " convert the model's Hugging Face folder instead"
            )


def _vocabulary(header: GgufHeader, where: str) -> int:
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ArchitectureError(f"{where}: no two-dimensional token_embd.weight")
    return embedding.shape[0]


def _attention(metadata: _Metadata, hidden: int) -> dict[str, int]:
    heads = metadata.integer("attention.head_count")
    key_length = metadata.integer("attention.key_length", max(hidden // heads, 1))
    rotary = metadata.integer("rope.dimension_count", key_length)
    head_dim = metadata.integer("attention.key_length", rotary)
    value_length = metadata.integer("attention.value_length", head_dim)
    if not head_dim == rotary == value_length:
        raise metadata.fail(
            f"key length {head_dim}, value length {value_length} and rotary dimensions {rotary}"
            " differ, which is not supported"
        )
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
    }


def _rope(metadata: _Metadata, head_dim: int, factors: Sequence[float] | None) -> dict[str, Any]:
    base = metadata.number("rope.freq_base", 10000.0)
    rope: dict[str, Any] = {"rope_theta": base, "rope_type": "default"}
    kind = metadata.get("rope.scaling.type")
    if factors is not None:
        if kind not in (None, "none"):
            raise metadata.fail(f"both {kind!r} scaling and rope_freqs.weight")
        return {**rope, **_llama3_scaling(metadata, base, head_dim, factors)}
    if kind in (None, "none"):
        return rope
    if kind not in ("linear", "yarn"):
        raise metadata.fail(f"rope scaling {kind!r} is not supported")
    rope.update(rope_type=kind, factor=metadata.number("rope.scaling.factor"))
    if kind == "yarn":
        original = metadata.integer("rope.scaling.original_context_length")
        rope["original_max_position_embeddings"] = original
    return rope


def _llama3_scaling(
    metadata: _Metadata, base: float, head_dim: int, factors: Sequence[float]
) -> dict[str, Any]:
    """Llama 3.1's parameters, accepted only if they give back the factors in the file.

    GGUF keeps the resulting factor of each rotary frequency and not the four parameters. All
    Llama 3.1 to 3.3 models share three of them; the fourth is the largest factor.
    """
    factor = float(max(factors, default=1.0))
    found = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = _llama3_factors(base, head_dim, factor)
    if len(factors) != len(expected) or not np.allclose(factors, expected, rtol=1e-4):
        raise metadata.fail(
            "rope_freqs.weight is not Llama 3's frequency scaling, and others are not supported;"
            " convert the model's Hugging Face folder instead"
        )
    return found


def _llama3_factors(base: float, head_dim: int, factor: float) -> list[float]:
    """Divisor of each rotary frequency under Llama 3.1's rule with factors 1 and 4, length 8192."""
    factors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * base ** (index / head_dim)
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        smooth = min(max(smooth, 0.0), 1.0)
        factors.append(1.0 / ((1 - smooth) / factor + smooth))
    return factors
