"""Rotary position embeddings as GGUF keys and tensors of factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from sketchconv.errors import ArchitectureError
from sketchconv.formats import gguf_values as v

RopeTensors = Mapping[str, tuple[float, ...]]
RopeKeys = Mapping[str, bytes]
_YARN_DEFAULTS: Final = {"beta_fast": 32.0, "beta_slow": 1.0}


def plain_rope(rope: Mapping[str, Any], head_dim: int) -> tuple[RopeKeys, RopeTensors]:
    """Keys below the architecture's prefix, and `rope_freqs.weight` for Llama 3's scaling.

    Args:
        rope: `rope_parameters` of transformers' config.
        head_dim: dimensions of a head that are rotated.

    Raises:
        ArchitectureError: a kind of scaling that llama.cpp does not have.
    """
    kind = rope.get("rope_type", "default")
    keys = {"rope.freq_base": v.float32(float(rope["rope_theta"]))}
    if kind == "default":
        return keys, {}
    if kind == "linear":
        keys["rope.scaling.type"] = v.string("linear")
        keys["rope.scaling.factor"] = v.float32(float(rope["factor"]))
        return keys, {}
    if kind == "yarn":
        return {**keys, **_yarn(rope)}, {}
    if kind == "llama3":
        return keys, {"rope_freqs.weight": llama3_factors(rope, head_dim)}
    raise ArchitectureError(
        f"config: rope scaling {kind!r} has no equivalent in GGUF for this architecture;"
        " supported are default, linear, yarn and llama3"
    )


def _yarn(rope: Mapping[str, Any]) -> RopeKeys:
    """YaRN (Peng et al. 2023) with the published settings, the only ones both sides share."""
    for key in ("attention_factor", "mscale", "mscale_all_dim"):
        if rope.get(key) is not None:
            raise ArchitectureError(f"config: yarn with {key} = {rope[key]} is not supported")
    if not rope.get("truncate", True):
        raise ArchitectureError(
            "config: yarn with truncate = false is not supported: llama.cpp rounds the borders"
            " between stretched and kept frequencies"
        )
    for key, usual in _YARN_DEFAULTS.items():
        if float(rope.get(key) or usual) != usual:
            raise ArchitectureError(f"config: yarn with {key} = {rope[key]} is not supported")
    return {
        "rope.scaling.type": v.string("yarn"),
        "rope.scaling.factor": v.float32(float(rope["factor"])),
        "rope.scaling.original_context_length": v.uint32(
            int(rope["original_max_position_embeddings"])
        ),
    }


def llama3_factors(rope: Mapping[str, Any], head_dim: int) -> tuple[float, ...]:
    """The divisor of each rotary frequency under Llama 3.1's rule, ``[head_dim / 2]``.

    Wavelengths beyond original / low_freq_factor are stretched by `factor`, those below
    original / high_freq_factor are kept, and those between are blended.
    """
    theta, factor = float(rope["rope_theta"]), float(rope["factor"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    original = float(rope["original_max_position_embeddings"])
    factors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (index / head_dim)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return tuple(factors)


def longrope(
    rope: Mapping[str, Any], rotary: int, length: int, original: int
) -> tuple[RopeKeys, RopeTensors]:
    """LongRoPE as Phi-3 uses it: factors for short and long contexts, and their scale.

    Raises:
        ArchitectureError: lists of factors that do not fit the head.
    """
    tensors = {}
    for key in ("long", "short"):
        factors = tuple(float(x) for x in rope[f"{key}_factor"])
        if len(factors) != rotary // 2:
            raise ArchitectureError(
                f"config: {key}_factor has {len(factors)} values, expected {rotary // 2}"
            )
        tensors[f"rope_factors_{key}.weight"] = factors
    scale = float(rope.get("factor") or length / original)
    attention = rope.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    keys = {
        "rope.freq_base": v.float32(float(rope["rope_theta"])),
        "rope.scaling.attn_factor": v.float32(float(attention)),
    }
    return keys, tensors
