"""GGUF architectures that are understood: tensor names in Hugging Face's terms, and their form.

The tables of both directions: exports read them the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from sketchconv.errors import ArchitectureError


@dataclass(frozen=True, slots=True)
class GgufArchitecture:
    """How one `general.architecture` maps to transformers.

    Attributes:
        name: the value of `general.architecture`.
        model_type: transformers' model type.
        model_class: transformers' class.
        globals: tensors outside the blocks, GGUF to Hugging Face.
        layers: what stands before a layer's number in Hugging Face's names.
        layer: names inside one block, GGUF to Hugging Face, without `.weight` / `.bias`.
        rotary_pairs: rows of q and k are stored in the order of adjacent rotary pairs, where
            transformers keeps the two halves of a head apart.
        norm_offset: the weights of RMSNorm are stored plus 1.
        transposed: matrices of a block that transformers keeps as ``[in, out]``.
        factors: tensors of factors of rotary frequencies, which become part of the config.
    """

    name: str
    model_type: str
    model_class: str
    globals: Mapping[str, str]
    layers: str
    layer: Mapping[str, str]
    rotary_pairs: bool = False
    norm_offset: bool = False
    transposed: frozenset[str] = frozenset()
    factors: frozenset[str] = field(default=frozenset())


LLAMA_LAYER: Final = {
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
_HEAD_NORMS: Final = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
QWEN3_LAYER: Final = {**LLAMA_LAYER, **_HEAD_NORMS}
GEMMA2_LAYER: Final = {
    **LLAMA_LAYER,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GEMMA3_LAYER: Final = {**GEMMA2_LAYER, **_HEAD_NORMS}
PHI3_LAYER: Final = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
GPT2_LAYER: Final = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
GLOBALS: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_TIED_GLOBALS: Final = {name: GLOBALS[name] for name in ("token_embd.weight", "output_norm.weight")}
GPT2_GLOBALS: Final = {
    "token_embd.weight": "transformer.wte.weight",
    "position_embd.weight": "transformer.wpe.weight",
    "output_norm.weight": "transformer.ln_f.weight",
    "output_norm.bias": "transformer.ln_f.bias",
    "output.weight": "lm_head.weight",
}
LAYERS: Final = "model.layers"
GPT2_LAYERS: Final = "transformer.h"
LLAMA3_FACTORS: Final = "rope_freqs.weight"
LONG_FACTORS: Final = "rope_factors_long.weight"
SHORT_FACTORS: Final = "rope_factors_short.weight"
_BLOCK: Final = re.compile(r"blk\.(\d{1,9})\.(\w+)\.(weight|bias)", re.ASCII)

_ALL: Final = (
    GgufArchitecture(
        "llama",
        "llama",
        "LlamaForCausalLM",
        GLOBALS,
        LAYERS,
        LLAMA_LAYER,
        rotary_pairs=True,
        factors=frozenset({LLAMA3_FACTORS}),
    ),
    GgufArchitecture("qwen2", "qwen2", "Qwen2ForCausalLM", GLOBALS, LAYERS, LLAMA_LAYER),
    GgufArchitecture("qwen3", "qwen3", "Qwen3ForCausalLM", GLOBALS, LAYERS, QWEN3_LAYER),
    GgufArchitecture(
        "gemma2",
        "gemma2",
        "Gemma2ForCausalLM",
        _TIED_GLOBALS,
        LAYERS,
        GEMMA2_LAYER,
        norm_offset=True,
    ),
    GgufArchitecture(
        "gemma3",
        "gemma3_text",
        "Gemma3ForCausalLM",
        GLOBALS,
        LAYERS,
        GEMMA3_LAYER,
        norm_offset=True,
    ),
    GgufArchitecture(
        "phi3",
        "phi3",
        "Phi3ForCausalLM",
        GLOBALS,
        LAYERS,
        PHI3_LAYER,
        factors=frozenset({LONG_FACTORS, SHORT_FACTORS}),
    ),
    GgufArchitecture(
        "gpt2",
        "gpt2",
        "GPT2LMHeadModel",
        GPT2_GLOBALS,
        GPT2_LAYERS,
        GPT2_LAYER,
        transposed=frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
    ),
)
ARCHITECTURES: Final[Mapping[str, GgufArchitecture]] = MappingProxyType(
    {arch.name: arch for arch in _ALL}
)
"""By `general.architecture`."""


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
    if name in arch.globals:
        return arch.globals[name]
    block = _BLOCK.fullmatch(name)
    if block and block[2] in arch.layer:
        return f"{arch.layers}.{int(block[1])}.{arch.layer[block[2]]}.{block[3]}"
    raise ArchitectureError(
        f"{where}: tensor {name!r} is unknown in architecture {arch.name!r};"
        " convert the model's Hugging Face folder instead"
    )


def is_rotary(arch: GgufArchitecture, name: str) -> bool:
    """Whether the rows of this GGUF tensor are in the order of rotary pairs."""
    return arch.rotary_pairs and _module(name) in ("attn_q", "attn_k")


def is_shifted(arch: GgufArchitecture, name: str) -> bool:
    """Whether this GGUF tensor has 1 + w where the model has w."""
    return arch.norm_offset and name.endswith("_norm.weight")


def is_transposed(arch: GgufArchitecture, name: str) -> bool:
    """Whether transformers keeps this matrix as ``[in, out]``."""
    return name.endswith(".weight") and _module(name) in arch.transposed


def _module(name: str) -> str | None:
    block = _BLOCK.fullmatch(name)
    return block[2] if block else None
