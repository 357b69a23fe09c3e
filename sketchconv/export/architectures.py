"""The architectures that can be exported: GGUF names of their tensors, and what must be changed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal

from sketchconv.errors import ArchitectureError
from sketchconv.sources import gguf_names as names

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
        biases: GGUF modules of a layer that may have a bias.
    """

    name: str
    classes: tuple[str, ...]
    globals: Mapping[str, str]
    layers: str
    layer: Mapping[str, str]
    rotary: bool = False
    norm_offset: bool = False
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


def _inverted(table: Mapping[str, str]) -> dict[str, str]:
    return {hugging_face: gguf for gguf, hugging_face in table.items()}


_QKV: Final = frozenset({"attn_q", "attn_k", "attn_v"})
_LLAMA_BIASES: Final = _QKV | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"}


def _as_read(name: str, *classes: str, **settings: Any) -> ExportArchitecture:
    """An architecture with the names, the order of rows and the norms of the one that is read."""
    read = names.ARCHITECTURES[name]
    return ExportArchitecture(
        name,
        classes or (read.model_class,),
        _inverted(read.globals),
        read.layers,
        _inverted(read.layer),
        rotary=read.rotary_pairs,
        norm_offset=read.norm_offset,
        **settings,
    )


_ALL: Final = (
    _as_read("llama", "LlamaForCausalLM", "MistralForCausalLM", biases=_LLAMA_BIASES),
    _as_read("qwen2", biases=_QKV),
    _as_read("qwen3"),
    _as_read("gemma2"),
    _as_read("gemma3"),
    _as_read("phi3"),
    _as_read("gpt2", biases=frozenset(names.GPT2_LAYER)),
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
