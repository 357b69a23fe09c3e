"""GGUF architectures that are understood: tensor names in Hugging Face's terms, and row order."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from sketchconv.errors import ArchitectureError


@dataclass(frozen=True, slots=True)
class GgufArchitecture:
    """How one `general.architecture` maps to transformers.

    Attributes:
        name: the value of `general.architecture`.
        model_type: transformers' model type.
        model_class: transformers' class.
        rotary_pairs: rows of q and k are stored in the order of adjacent rotary pairs, where
            transformers keeps the two halves of a head apart.
        layer: names inside one block, GGUF to Hugging Face, without `.weight` / `.bias`.
    """

    name: str
    model_type: str
    model_class: str
    rotary_pairs: bool
    layer: Mapping[str, str]


LLAMA_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
QWEN3_LAYER = {
    **LLAMA_LAYER,
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_GLOBAL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
ROPE_FACTORS = "rope_freqs.weight"
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROTARY = re.compile(r"blk\.\d+\.attn_[qk]\.(?:weight|bias)")

ARCHITECTURES: Mapping[str, GgufArchitecture] = {
    arch.name: arch
    for arch in (
        GgufArchitecture("llama", "llama", "LlamaForCausalLM", True, LLAMA_LAYER),
        GgufArchitecture("qwen2", "qwen2", "Qwen2ForCausalLM", False, LLAMA_LAYER),
        GgufArchitecture("qwen3", "qwen3", "Qwen3ForCausalLM", False, QWEN3_LAYER),
    )
}


def find_architecture(name: object, where: str) -> GgufArchitecture:
    """The table for a `general.architecture`.

    Raises:
        ArchitectureError: not supported; names those that are.
    """
    if isinstance(name, str) and name in ARCHITECTURES:
        return ARCHITECTURES[name]
    raise ArchitectureError(
        f"{where}: GGUF architecture {name!r} is not supported; supported are"
        f" {', '.join(sorted(ARCHITECTURES))} (the llama one covers Mistral and SmolLM);"
        " convert the model's Hugging Face folder instead"
    )


def hugging_face_name(arch: GgufArchitecture, name: str, where: str) -> str:
    """The Hugging Face name of a GGUF tensor.

    Raises:
        ArchitectureError: the architecture has no such tensor.
    """
    if name in _GLOBAL:
        return _GLOBAL[name]
    block = _BLOCK.fullmatch(name)
    if block and block[2] in arch.layer:
        return f"model.layers.{int(block[1])}.{arch.layer[block[2]]}.{block[3]}"
    raise ArchitectureError(
        f"{where}: tensor {name!r} is unknown in architecture {arch.name!r};"
        " convert the model's Hugging Face folder instead"
    )


def is_rotary(arch: GgufArchitecture, name: str) -> bool:
    """Whether the rows of this GGUF tensor are in the order of rotary pairs."""
    return arch.rotary_pairs and _ROTARY.fullmatch(name) is not None
