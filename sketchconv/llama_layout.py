"""Recognise networks laid out as Llama's: RMSNorm, gated attention-MLP blocks, residual sums."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sketchconv.formats.tensors import TensorInfo

# Model types whose blocks compute exactly that. Others share the names but not the arithmetic
# (gemma's gain is 1 + w, granite scales its residuals), so names alone are not enough.
MODEL_TYPES = frozenset({"llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3"})

_BLOCK = re.compile(
    r"(?P<root>.*?)layers\.(?P<layer>\d+)\.(?P<module>[\w.]+)\.(?P<kind>weight|bias)"
)
_ROLES = {
    "input_layernorm": "norm_1",
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "post_attention_layernorm": "norm_2",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
_SIDE_MODULES = ("self_attn.q_norm", "self_attn.k_norm", "self_attn.rotary_emb")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor sits: its block (-1 for the embedding, the last for final norm and head)."""

    name: str
    layer: int
    role: str
    bias: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors of a llama-like network in the order in which they act.

    Attributes:
        places: by tensor name, in order.
        hidden: channels of the residual stream.
        head_dim: channels of one attention head.
        queries_per_value: query heads that share one value head.
        epsilon: of RMSNorm.
    """

    places: Mapping[str, Place]
    hidden: int
    head_dim: int
    queries_per_value: int
    epsilon: float

    @property
    def order(self) -> tuple[str, ...]:
        """Tensor names in order."""
        return tuple(self.places)

    def before(self, place: Place) -> list[str]:
        """Names of all tensors that come before one, but for the earlier ones of its own module."""
        names = []
        for name, other in self.places.items():
            if name == place.name or (other.layer, other.role) == (place.layer, place.role):
                break
            names.append(name)
        return names


def find_layout(config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> Layout | str:
    """The layout, or in a few words why there is none."""
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        return f"not known for model type {model_type!r} yet"
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        return f"not known for the activation {config.get('hidden_act')!r}"
    places = _find_places(infos)
    if isinstance(places, str):
        return places
    return _measure(config, infos, places)


def _find_places(infos: Mapping[str, TensorInfo]) -> dict[str, Place] | str:
    roots = {m["root"] for m in map(_BLOCK.fullmatch, infos) if m}
    if len(roots) != 1:
        return "no single stack of layers"
    root = roots.pop()
    blocks: dict[int, dict[tuple[str, bool], str]] = {}
    for name in infos:
        match = _BLOCK.fullmatch(name)
        if not match or match["module"] in _SIDE_MODULES:
            continue
        if match["module"] not in _ROLES:
            return f"unknown module {match['module']} in a layer"
        key = (_ROLES[match["module"]], match["kind"] == "bias")
        blocks.setdefault(int(match["layer"]), {})[key] = name
    places = [Place(f"{root}embed_tokens.weight", -1, "embedding")]
    for layer in range(len(blocks)):
        for role in _ROLES.values():
            if (role, False) not in blocks.get(layer, {}):
                return f"layer {layer} has no {role}"
            for bias in (False, True):
                if (role, bias) in blocks[layer]:
                    places.append(Place(blocks[layer][role, bias], layer, role, bias))
    places.append(Place(f"{root}norm.weight", len(blocks), "norm"))
    if "lm_head.weight" in infos:
        places.append(Place("lm_head.weight", len(blocks), "head"))
    missing = [place.name for place in places if place.name not in infos]
    return f"no {missing[0]}" if missing else {place.name: place for place in places}


def _measure(
    config: Mapping[str, Any], infos: Mapping[str, TensorInfo], places: dict[str, Place]
) -> Layout | str:
    by_role = {p.role: infos[name].shape for name, p in places.items() if not p.bias}
    if any(len(by_role[role]) != 2 for role in ("embedding", "v", "o", "gate", "up", "down")):
        return "a linear weight is not two-dimensional"
    hidden, attention, values = by_role["embedding"][1], by_role["o"][1], by_role["v"][0]
    heads = config.get("num_attention_heads")
    if not isinstance(heads, int) or heads < 1 or attention % heads:
        return "no usable num_attention_heads in the config"
    head_dim = attention // heads
    if values % head_dim or heads % max(values // head_dim, 1):
        return f"{values} value rows do not fit {heads} heads of {head_dim}"
    expected = {
        "v": (values, hidden),
        "o": (hidden, attention),
        "gate": (by_role["gate"][0], hidden),
        "up": (by_role["gate"][0], hidden),
        "down": (hidden, by_role["gate"][0]),
    }
    for name, place in places.items():
        if not place.bias and infos[name].shape != expected.get(place.role, infos[name].shape):
            return f"{name} has an unexpected shape"
    epsilon = config.get("rms_norm_eps", 1e-6)
    return Layout(
        places,
        hidden,
        head_dim,
        heads // (values // head_dim),
        float(epsilon) if isinstance(epsilon, (int, float)) else 1e-6,
    )
