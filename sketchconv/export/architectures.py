"""The architectures that can be exported: GGUF names of their tensors, and what must be changed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from sketchconv.errors import ArchitectureError
from sketchconv.sources.gguf_names import LLAMA_LAYER, QWEN3_LAYER

Change = Literal["none", "rotary_q", "rotary_k", "plus_one", "transpose"]


@dataclass(frozen=True, slots=True)
class ExportArchitecture:
    """How one family of models maps to GGUF.

    Attributes:
        name: `general.architecture`, also the prefix of its keys.
        classes: transformers' classes whose weights and arithmetic fit.
        globals: tensors outside the layers, Hugging Face name to GGUF name.
        layers: what stands before a layer's number.
        layer: modules of a layer, Hugging Face name to GGUF name, without `.weight` or `.bias`.
        rotary: rows of q and k are stored in the order of adjacent rotary pairs.
        norm_offset: GGUF stores 1 + w for RMSNorm's weights.
        output: whether an output matrix of its own is possible.
        biases: GGUF modules of a layer that may have a bias.
    """

    name: str
    classes: tuple[str, ...]
    globals: Mapping[str, str]
    layers: str
    layer: Mapping[str, str]
    rotary: bool = False
    norm_offset: bool = False
    output: bool = True
    biases: frozenset[str] = frozenset()

    def gguf_name(self, name: str) -> str:
        """The GGUF name of one of the model's own tensor names.

        Raises:
            ArchitectureError: the architecture has no such tensor in GGUF.
        """
        if name in self.globals:
            return self.globals[name]
        match = re.fullmatch(rf"{re.escape(self.layers)}\.(\d+)\.(.+)\.(weight|bias)", name)
        module = self.layer.get(match[2]) if match else None
        allowed = match is not None and (match[3] == "weight" or module in self.biases)
        if match is None or module is None or not allowed:
            raise ArchitectureError(
                f"{name}: GGUF architecture {self.name!r} has no place for this tensor; the model"
                " cannot be exported without changing what it computes"
            )
        return f"blk.{int(match[1])}.{module}.{match[3]}"

    def change(self, gguf_name: str) -> Change:
        """What is done to a tensor's values or rows on the way."""
        if self.rotary and re.fullmatch(r"blk\.\d+\.attn_q\.(weight|bias)", gguf_name):
            return "rotary_q"
        if self.rotary and re.fullmatch(r"blk\.\d+\.attn_k\.(weight|bias)", gguf_name):
            return "rotary_k"
        if self.norm_offset and gguf_name.endswith("_norm.weight"):
            return "plus_one"
        return "none"


def _inverted(layer: Mapping[str, str]) -> dict[str, str]:
    return {hugging_face: gguf for gguf, hugging_face in layer.items()}


_GLOBALS: Final = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LLAMA: Final = _inverted(LLAMA_LAYER)
_QWEN3: Final = _inverted(QWEN3_LAYER)
_GEMMA2: Final = {
    **_LLAMA,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_GEMMA3: Final = {
    **_GEMMA2,
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
_PHI3: Final = {
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GPT2: Final = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_GPT2_GLOBALS: Final = {
    "transformer.wte.weight": "token_embd.weight",
    "transformer.wpe.weight": "position_embd.weight",
    "transformer.ln_f.weight": "output_norm.weight",
    "transformer.ln_f.bias": "output_norm.bias",
    "lm_head.weight": "output.weight",
}
_STACK: Final = "model.layers"
_QKV: Final = frozenset({"attn_q", "attn_k", "attn_v"})
_LLAMA_BIASES: Final = _QKV | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"}

_ALL: Final = (
    ExportArchitecture(
        "llama",
        ("LlamaForCausalLM", "MistralForCausalLM"),
        _GLOBALS,
        _STACK,
        _LLAMA,
        rotary=True,
        biases=_LLAMA_BIASES,
    ),
    ExportArchitecture("qwen2", ("Qwen2ForCausalLM",), _GLOBALS, _STACK, _LLAMA, biases=_QKV),
    ExportArchitecture("qwen3", ("Qwen3ForCausalLM",), _GLOBALS, _STACK, _QWEN3),
    ExportArchitecture(
        "gemma2",
        ("Gemma2ForCausalLM",),
        _GLOBALS,
        _STACK,
        _GEMMA2,
        norm_offset=True,
        output=False,
    ),
    ExportArchitecture(
        "gemma3", ("Gemma3ForCausalLM",), _GLOBALS, _STACK, _GEMMA3, norm_offset=True
    ),
    ExportArchitecture("phi3", ("Phi3ForCausalLM",), _GLOBALS, _STACK, _PHI3),
    ExportArchitecture(
        "gpt2",
        ("GPT2LMHeadModel",),
        _GPT2_GLOBALS,
        "transformer.h",
        _GPT2,
        biases=frozenset(_GPT2.values()),
    ),
)

ARCHITECTURES: Final[Mapping[str, ExportArchitecture]] = MappingProxyType(
    {name: architecture for architecture in _ALL for name in architecture.classes}
)
"""By transformers' class."""


def find_architecture(classes: tuple[str, ...], where: str) -> ExportArchitecture:
    """The architecture of the first class that is known.

    Raises:
        ArchitectureError: none is; names those that are.
    """
    for name in classes:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    raise ArchitectureError(
        f"{where}: a GGUF file of {', '.join(classes) or 'a model without a class'} cannot be"
        f" written; supported are {', '.join(ARCHITECTURES)}"
    )
