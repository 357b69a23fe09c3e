"""Recognise a network: its tensors in the order in which they act, and the role of each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sketchconv.formats.tensors import TensorInfo
from sketchconv.sensitivities.activations import ACTIVATIONS
from sketchconv.sensitivities.families import FAMILIES, Family

Infos = Mapping[str, TensorInfo]
_KINDS = ("weight", "bias")
_OLD_KINDS = {"gamma": "weight", "beta": "bias"}  # of LayerNorm in old BERT checkpoints


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor sits: its block (-1 in front of them, the last for what is behind them)."""

    name: str
    layer: int
    role: str
    bias: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors of a recognised network in the order in which they act.

    Attributes:
        family: how its blocks compute.
        places: by tensor name, in order.
        hidden: channels of the residual stream.
        head_dim: channels of one attention head.
        queries_per_value: query heads that share one value head.
        values: first and last row (exclusive) of the values in `v` or `qkv`.
        activation: of the MLP, as the config calls it.
        epsilon: of the norms.
    """

    family: Family
    places: Mapping[str, Place]
    hidden: int
    head_dim: int
    queries_per_value: int
    values: tuple[int, int]
    activation: str
    epsilon: float

    @property
    def order(self) -> tuple[str, ...]:
        """Tensor names in order."""
        return tuple(self.places)


def find_layout(config: Mapping[str, Any], infos: Infos) -> Layout | str:
    """The layout, or in a few words why there is none."""
    model_type = config.get("model_type")
    family = next((f for f in FAMILIES if model_type in f.model_types), None)
    if family is None:
        return f"not known for model type {model_type!r} yet"
    named = (config.get(key) for key in family.activation)
    activation = next((name for name in named if name is not None), "silu")
    if activation not in ACTIVATIONS:
        return f"not known for the activation {activation!r}"
    places = _find_places(family, infos)
    if isinstance(places, str):
        return places
    heads = config.get(family.heads)
    if not isinstance(heads, int) or heads < 1:
        return f"no usable {family.heads} in the config"
    epsilon = config.get(family.epsilon, 1e-6)
    return _measure(
        (family, heads, activation, float(epsilon) if isinstance(epsilon, int | float) else 1e-6),
        infos,
        places,
    )


def _find_places(family: Family, infos: Infos) -> dict[str, Place] | str:
    pattern = re.compile(
        rf"(?P<root>(?:.*?\.)?){re.escape(family.stack)}\.(?P<layer>\d+)\.(?P<module>[\w.]+)\."
        r"(?:weight|bias|gamma|beta)"
    )
    matches = [m for m in map(pattern.fullmatch, infos) if m]
    roots = {m["root"] for m in matches}
    if len(roots) != 1:
        return "no single stack of layers"
    root = roots.pop()
    roles = dict(family.block)
    for match in matches:
        if match["module"] not in roles and match["module"] not in family.sides:
            return f"unknown module {match['module']} in a layer"
    layers = 1 + max(int(match["layer"]) for match in matches)
    places = _placed(family.first, -1, [root], infos)
    for layer in range(layers):
        places += _placed(family.block, layer, [f"{root}{family.stack}.{layer}."], infos)
    places += _placed(family.last, layers, [root, ""], infos)
    return _missing(family, places, layers, root) or {place.name: place for place in places}


def _placed(
    modules: Sequence[tuple[str, str]], layer: int, roots: Sequence[str], infos: Infos
) -> list[Place]:
    """Weight and bias of each module, as far as there are any."""
    found = []
    for path, role in modules:
        for kind in (*_KINDS, *_OLD_KINDS):
            for name in dict.fromkeys(f"{root}{path}.{kind}" for root in roots):
                if name in infos:
                    bias = _OLD_KINDS.get(kind, kind) == "bias"
                    found.append(Place(name, layer, role, bias))
    return found


def _missing(family: Family, places: Sequence[Place], layers: int, root: str) -> str | None:
    present = {(place.layer, place.role) for place in places if not place.bias}
    for path, role in family.first:
        if (-1, role) not in present:
            return f"no {root}{path}.weight"
    for layer in range(layers):
        for _, role in family.block:
            if (layer, role) not in present:
                return f"layer {layer} has no {role}"
    if "norm" in dict(family.last).values() and (layers, "norm") not in present:
        path = next(path for path, role in family.last if role == "norm")
        return f"no {root}{path}.weight"
    return None


def _measure(
    given: tuple[Family, int, str, float], infos: Infos, places: dict[str, Place]
) -> Layout | str:
    family, heads, activation, epsilon = given
    turn = -1 if family.transposed else 1
    linear = {"q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down"}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, place in places.items():
        if not place.bias and place.role in (*linear, "embedding"):
            shape = infos[name].shape
            if len(shape) != 2:
                return f"{name} is not two-dimensional"
            shape = shape if place.role == "embedding" else shape[::turn]
            if shapes.setdefault(place.role, shape) != shape:
                return f"{name} has an unexpected shape"
    hidden, attention = shapes["embedding"][1], shapes["o"][1]
    if attention % heads:
        return f"no usable {family.heads} in the config"
    head_dim = attention // heads
    total = shapes["v"][0] if "v" in shapes else (shapes["qkv"][0] - attention) // 2
    if total < 1 or total % head_dim or heads % (total // head_dim):
        return f"{total} value rows do not fit {heads} heads of {head_dim}"
    inner = shapes["down"][1]
    wanted = {
        **{role: (shapes[role][0], hidden) for role in ("q", "k", "v") if role in shapes},
        "qkv": (attention + 2 * total, hidden),
        "o": (hidden, attention),
        **dict.fromkeys(("gate", "up"), (inner, hidden)),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }
    wrong = next((role for role, shape in wanted.items() if shapes.get(role, shape) != shape), None)
    if wrong is not None:
        return f"{wrong} has an unexpected shape"
    begin = 0 if "v" in shapes else attention + total
    return Layout(
        *(family, places, hidden, head_dim, heads // (total // head_dim)),
        *((begin, begin + total), activation, epsilon),
    )
