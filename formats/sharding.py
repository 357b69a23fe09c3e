"""How a folder's weights are cut into files, and the index that lists them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Final

from sketchconv.formats import rules
from sketchconv.formats.draft import Draft, Layout, file_layout
from sketchconv.formats.errors import refuse, shown
from sketchconv.formats.paths import check_paths
from sketchconv.formats.sketches import SketchRecord
from sketchconv.formats.tensors import TensorInfo

SINGLE_NAME: Final = "model.safetensors"
INDEX_NAME: Final = "model.safetensors.index.json"


def folder_layouts(draft: Draft, max_shard_size: int) -> dict[str, Layout]:
    """Lay out the weight files of a folder, by file name.

    Index and LUT of a weight stay together, and weights follow each other in natural order of
    their names. A file takes weights until their bytes would pass `max_shard_size`; one larger
    weight gets a file of its own.

    Raises:
        FormatError, TypeError, ValueError: as for `bundle_layout`.
    """
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size must be at least 1 byte, got {max_shard_size}")
    shards = _split(draft, max_shard_size)
    if len(shards) > rules.MAX_SHARDS:
        raise ValueError(f"{len(shards)} shards; max_shard_size {max_shard_size} is too small")
    layouts = {}
    for i, units in enumerate(shards, 1):
        name = (
            SINGLE_NAME if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        )
        sketches = [u for u in units if isinstance(u, SketchRecord)]
        plain = [u for u in units if isinstance(u, TensorInfo)]
        held = {r.name for r in sketches} | {i.name for i in plain}
        aliases = {a: t for a, t in draft.aliases.items() if t in held}
        layouts[name] = file_layout(draft, sketches, plain, aliases, {}, name)
    _check_split(draft, layouts)
    return layouts


def index_json(layouts: Mapping[str, Layout]) -> bytes:
    """Return `model.safetensors.index.json` as transformers writes it."""
    weight_map = {name: shard for shard, layout in layouts.items() for name in layout.infos}
    total = sum(i.nbytes for layout in layouts.values() for i in layout.infos.values())
    value = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def folder_sizes(draft: Draft, files: Mapping[str, bytes], max_shard_size: int) -> dict[str, int]:
    """Return the exact bytes of every file of the folder, by name. Raises as `folder_layouts`."""
    layouts = folder_layouts(draft, max_shard_size)
    sizes = {path: len(data) for path, data in files.items()}
    sizes.update({name: layout.size for name, layout in layouts.items()})
    if len(layouts) > 1:
        sizes[INDEX_NAME] = len(index_json(layouts))
    return sizes


def folder_files(files: Mapping[str, bytes], layouts: Mapping[str, Layout]) -> dict[str, bytes]:
    """Return the files of a folder beside its weights, the index among them when it is needed.

    Raises:
        FormatError: SKT-090 for a bad path, SKT-093 for a file that collides with another.
    """
    others = dict(files)
    if len(layouts) > 1:
        if INDEX_NAME in others:
            refuse("SKT-093", "folder", f"{INDEX_NAME} is written by the writer itself")
        others[INDEX_NAME] = index_json(layouts)
    taken = {name: rules.FILE_PREFIX + str(i) for i, name in enumerate([*others, *layouts])}
    if len(taken) != len(others) + len(layouts):
        refuse("SKT-093", "folder", "a file has the name of a weight file")
    check_paths(taken, "folder")
    return others


def _split(draft: Draft, limit: int) -> list[list[SketchRecord | TensorInfo]]:
    units: list[SketchRecord | TensorInfo] = [*draft.sketches, *draft.plain]
    shards: list[list[SketchRecord | TensorInfo]] = [[]]
    used = 0
    for unit in sorted(units, key=lambda u: _natural(u.name)):
        size = _unit_bytes(unit)
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(unit)
        used += size
    return shards


def _unit_bytes(unit: SketchRecord | TensorInfo) -> int:
    if isinstance(unit, TensorInfo):
        return unit.nbytes
    unit.check("draft")
    return unit.index_info.nbytes + unit.lut_info.nbytes


def _natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    # Numbers by length, then digits: foreign names may hold more digits than int() takes.
    return [_natural_part(p) for p in re.split(r"([0-9]+)", name) if p], name


def _natural_part(part: str) -> tuple[int, int, str]:
    if not re.fullmatch("[0-9]+", part):
        return 0, 0, part
    digits = part.lstrip("0")
    return 1, len(digits), digits


def _check_split(draft: Draft, layouts: Mapping[str, Layout]) -> None:
    names = [r.name for r in draft.sketches] + [i.name for i in draft.plain]
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        refuse("SKT-009", "draft", f"{shown(twice)} is named twice")
    placed = {a for layout in layouts.values() for a in layout.manifest.aliases}
    for name, target in draft.aliases.items():
        if name not in placed:
            refuse("SKT-086", f"draft: alias {name}", f"no weight {shown(target)}")
        if name in names:
            refuse("SKT-085", f"draft: alias {name}", "the name is also stored or sketched")
