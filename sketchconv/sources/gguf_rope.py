"""Rotary position embeddings of a GGUF file as `rope_parameters` of transformers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np

from sketchconv.sources.gguf_metadata import Metadata, shortest
from sketchconv.sources.gguf_names import LLAMA3_FACTORS, LONG_FACTORS, SHORT_FACTORS

ROPE_KEYS: Final = frozenset(
    {
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
    }
)
"""What is understood below an architecture's prefix."""
# Files keep factors in float32, and some writers compute them in it.
_CLOSE: Final = 1e-5
_POWERS: Final = tuple(2.0**power for power in range(4, 24))
_LONGEST: Final = 1 << 24
_RATIOS: Final = (4.0, 2.0, 8.0, 16.0, 32.0)


def plain_rope(metadata: Metadata, head_dim: int) -> dict[str, Any]:
    """Default, linear, YaRN or Llama 3's frequencies.

    Raises:
        ArchitectureError: scaling of another kind.
    """
    rope: dict[str, Any] = {
        "rope_theta": metadata.number("rope.freq_base", 10000.0),
        "rope_type": "default",
    }
    kind = metadata.get("rope.scaling.type")
    factors = metadata.factors.get(LLAMA3_FACTORS)
    if factors is not None:
        if kind not in (None, "none"):
            raise metadata.fail(f"both {kind!r} scaling and rope_freqs.weight")
        return {**rope, **_llama3_scaling(metadata, rope["rope_theta"], head_dim, factors)}
    if kind in (None, "none"):
        return rope
    if kind not in ("linear", "yarn"):
        raise metadata.fail(f"rope scaling {kind!r} is not supported")
    rope.update(rope_type=kind, factor=metadata.number("rope.scaling.factor"))
    if kind == "yarn":
        original = metadata.integer("rope.scaling.original_context_length")
        rope["original_max_position_embeddings"] = original
    return rope


def long_rope(metadata: Metadata, rotary: int) -> dict[str, Any]:
    """LongRoPE as in Phi-3, or plain frequencies where the file has no factors.

    Args:
        metadata: the file's keys.
        rotary: dimensions of a head that are rotated.

    Raises:
        ArchitectureError: one set of factors without the other, or factors that do not fit.
    """
    kind = metadata.get("rope.scaling.type")
    if kind not in (None, "none", "longrope"):
        raise metadata.fail(f"rope scaling {kind!r} is not supported for {metadata.prefix}")
    base = {"rope_theta": metadata.number("rope.freq_base", 10000.0), "rope_type": "default"}
    if not metadata.factors:
        return base
    found = {}
    for name, key in ((SHORT_FACTORS, "short_factor"), (LONG_FACTORS, "long_factor")):
        factors = metadata.factors.get(name)
        if factors is None or len(factors) != rotary // 2 or not _positive(factors):
            raise metadata.fail(f"{name} must have {rotary // 2} positive factors")
        found[key] = [shortest(x) for x in factors]
    original = metadata.integer("rope.scaling.original_context_length")
    rope = {**base, "rope_type": "longrope", **found, "original_max_position_embeddings": original}
    usual = _attention_factor(metadata.integer("context_length"), original)
    factor = metadata.number("rope.scaling.attn_factor", 1.0)
    return rope if factor == shortest(usual) else {**rope, "attention_factor": factor}


def _attention_factor(length: int, original: int) -> float:
    """LongRoPE's scale of attention (Ding et al. 2024), which a config need not name."""
    stretched = length > original > 1
    return math.sqrt(1 + math.log(length / original) / math.log(original)) if stretched else 1.0


def _positive(factors: Sequence[float]) -> bool:
    return all(0 < x < math.inf for x in factors)


def _llama3_scaling(
    metadata: Metadata, base: float, head_dim: int, factors: Sequence[float]
) -> dict[str, Any]:
    """Llama 3.1's parameters, accepted only if they give back the factors in the file.

    GGUF keeps the resulting factor of each rotary frequency and not the four parameters. One of
    them is free: only original / low and original / high count, so low is taken as 1.
    """
    if len(factors) == head_dim // 2 and _positive(factors):
        wanted = np.asarray(factors)
        best, least = None, _CLOSE
        for candidate in _candidates(base, head_dim, wanted):
            gap = float(np.abs(_llama3_factors(base, head_dim, *candidate) / wanted - 1).max())
            # The usual parameters come first: a later set must fit clearly better.
            if gap < (least if best is None else least / 2):
                best, least = candidate, gap
        if best is not None:
            factor, high, original = best
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": int(original),
            }
    raise metadata.fail(
        "rope_freqs.weight is not Llama 3's frequency scaling, and others are not supported;"
        " convert the model's Hugging Face folder instead"
    )


def _candidates(
    base: float, head_dim: int, factors: np.ndarray[Any, Any]
) -> Iterator[tuple[float, float, float]]:
    """Factor, high_freq_factor and original length, most usual first; and those that fit best."""
    factor = shortest(float(factors.max()))
    yield factor, 4.0, 8192.0
    for high in _RATIOS:
        for original in _POWERS:
            yield factor, high, original
    if factor <= 1:
        return
    # Between the borders, 1 / wavelength is a straight line over how much is kept of a frequency.
    turns = base ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    kept = (1 / factors - 1 / factor) / (1 - 1 / factor)
    between = (kept > 1e-3) & (kept < 1 - 1e-3)
    x, y = kept[between], turns[between]
    if len(x) < 2 or not np.ptp(x) > 0:
        return
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    begin = float(y.mean()) - slope * float(x.mean())
    if slope > 0 and 1 / _LONGEST < begin < 1:
        high = 1 + slope / begin
        for rounded in (round(high), round(high, 1), round(high, 3)):
            if rounded > 1:
                yield factor, float(rounded), float(round(1 / begin))


def _llama3_factors(
    base: float, head_dim: int, factor: float, high: float, original: float
) -> np.ndarray[Any, Any]:
    """Divisor of each rotary frequency under Llama 3.1's rule with low_freq_factor 1."""
    wavelength = 2 * math.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelength - 1.0) / (high - 1.0), 0.0, 1.0)
    found: np.ndarray[Any, Any] = 1.0 / ((1 - smooth) / factor + smooth)
    return found
