"""Which safetensors files hold a checkpoint, and which tensors each of them must hold."""

from __future__ import annotations

import re
from typing import Any

from sketchconv.errors import SourceError
from sketchconv.sources.config import parse_json, read_limited
from sketchconv.sources.folder import ModelFolder, safe_name
from sketchconv.sources.sniff import refuse_pickles

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 256 << 20
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


def find_shards(folder: ModelFolder) -> dict[str, frozenset[str] | None]:
    """The weight files by name, each with the tensors that the index expects in it.

    None stands for a single file, which has no index. `model.safetensors` wins over an index, as
    in transformers.

    Raises:
        SourceError: no safetensors, a broken index, or a shard that is missing.
    """
    if folder.has(SINGLE):
        return {SINGLE: None}
    if not folder.has(INDEX):
        raise SourceError(_explain_absence(folder))
    data = read_limited(folder.path(INDEX), MAX_INDEX_BYTES)
    shards: dict[str, set[str]] = {}
    for tensor, shard in parse_weight_map(data, INDEX).items():
        shards.setdefault(shard, set()).add(tensor)
    missing = [name for name in sorted(shards) if not folder.has(name)]
    if missing:
        raise SourceError(
            f"{folder.id}: {len(missing)} of {len(shards)} shards named in {INDEX} are missing:"
            f" {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}; download them again"
        )
    return {name: frozenset(shards[name]) for name in sorted(shards)}


def parse_weight_map(data: bytes, where: str) -> dict[str, str]:
    """The map from tensor name to shard name of an index file.

    Raises:
        SourceError: no such map, an entry that is not text, or a shard name that leaves the folder.
    """
    index: Any = parse_json(data, where)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{where}: no weight_map; download it again")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise SourceError(
                f"{where}: weight_map gives {shard!r} for {tensor!r}; expected a .safetensors name"
            )
        safe_name(shard)
    return weight_map


def check_members(shard: str, found: set[str], expected: frozenset[str]) -> None:
    """Compare the tensors in a shard with those that the index expects there.

    Raises:
        SourceError: a tensor is missing from the shard, or from the index.
    """
    absent = sorted(expected - found)
    if absent:
        raise SourceError(
            f"{shard}: {INDEX} says that it holds {absent[0]!r}, but it does not"
            f" ({len(absent)} such tensors); shard and index belong to different downloads"
        )
    extra = sorted(found - expected)
    if extra:
        raise SourceError(
            f"{shard}: tensor {extra[0]!r} is not in {INDEX} for this file"
            f" ({len(extra)} such tensors); shard and index belong to different downloads"
        )


def _explain_absence(folder: ModelFolder) -> str:
    names = folder.names()
    label = folder.id
    if any(_SHARD.fullmatch(name) for name in names):
        return f"{label}: holds shards but no {INDEX}; download the index too"
    if "adapter_config.json" in names:
        return f"{label}: an adapter without its base model; merge it into the base model first"
    ggufs = [name for name in names if name.endswith(".gguf")]
    if ggufs:
        return f"{label}: no {SINGLE}; to convert {ggufs[0]} give that file as the source"
    sketches = [name for name in names if name.endswith(".sktch")]
    if sketches:
        return f"{label}: holds a sketch ({sketches[0]}), not a dense model; load or inspect it"
    refuse_pickles(names, label)
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        return f"{label}: no {SINGLE} or {INDEX}; if {others[0]} is the model, rename it"
    return f"{label}: no {SINGLE} or {INDEX} in this folder; is it a model folder?"
