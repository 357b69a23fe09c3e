"""Several shards, one model: their documents agree, their tensors are those of the index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, TypeVar

from sketchconv.formats.errors import refuse, shown
from sketchconv.formats.manifest import Manifest
from sketchconv.formats.strict_json import dumps

_SAME: Final = ("version", "kind", "packing", "tool", "recipe", "source", "extensions", "unknown")
_V = TypeVar("_V")


def merge_manifests(manifests: Mapping[str, Manifest], where: str) -> Manifest:
    """Return one document for all shards.

    Args:
        manifests: each shard's document, by file name; at least one.
        where: the model, for the error.

    Raises:
        FormatError: SKT-106 if two documents contradict each other.
    """
    first_name, first = next(iter(manifests.items()))
    # As texts: to Python, true equals 1.
    texts = {member: dumps(getattr(first, member)) for member in _SAME}
    for name, other in manifests.items():
        for member, text in texts.items():
            if dumps(getattr(other, member)) != text:
                refuse("SKT-106", where, f"{member} of {name} and {first_name} differ")
    every = list(manifests.values())
    sentinels = [m.sentinel for m in every if m.sentinel is not None]
    return replace(
        first,
        sketches=_union([m.sketches for m in every], "sketch", where),
        digests=_union([m.digests for m in every], "digest", where),
        errors=_union([m.errors for m in every], "error", where),
        aliases=_union([m.aliases for m in every], "alias", where),
        files=_union([m.files for m in every], "file", where),
        sentinel=min(sentinels, default=None),
    )


def check_weight_map(
    weight_map: Mapping[str, str], stored: Mapping[str, Sequence[str]], where: str
) -> None:
    """Compare the index of a folder with what its shards hold.

    Args:
        weight_map: tensor -> shard, from the index.
        stored: shard -> its tensors.
        where: the folder, for the error.

    Raises:
        FormatError: SKT-105 for a tensor in two shards, not in the index, or not in its shard.
    """
    home: dict[str, str] = {}
    for shard, names in stored.items():
        for name in names:
            other = home.setdefault(name, shard)
            if other != shard:
                refuse("SKT-105", where, f"{name} is in {other} and in {shard}")
            if weight_map.get(name) != shard:
                got = weight_map.get(name)
                refuse("SKT-105", where, f"{name} is in {shard}, the index says {shown(got)}")
    for name, shard in weight_map.items():
        if name not in home:
            refuse("SKT-105", where, f"the index places {shown(name)} in {shard}: not there")


def _union(parts: Sequence[Mapping[str, _V]], what: str, where: str) -> dict[str, Any]:
    # Here equal values have equal texts: strings, checked records, errors of fixed form or null.
    out: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            if out.setdefault(key, value) != value:
                refuse("SKT-106", where, f"two shards disagree about the {what} of {shown(key)}")
    return out
