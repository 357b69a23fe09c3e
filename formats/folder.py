"""Find the weight files of a Hugging Face folder, and never leave the folder.

Works for our own folders and for foreign checkpoints. Links may stay inside the folder; only in a
snapshot of the Hugging Face cache may they also lead into that repository's `blobs/`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sketchconv.formats import rules
from sketchconv.formats.container import open_regular, pread_exact
from sketchconv.formats.errors import FormatError, refuse, shown
from sketchconv.formats.sharding import INDEX_NAME, SINGLE_NAME
from sketchconv.formats.sniff import PICKLE_SUFFIXES
from sketchconv.formats.strict_json import Limits, loads

CONFIG_NAME: Final = "config.json"
MAX_CONFIG: Final = 16 * 1024 * 1024
_SHARD: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,240}\.safetensors")
_INDEX_LIMITS: Final = Limits(
    rules.MAX_DOCUMENT_DEPTH, rules.MAX_VALUES, whitespace=True, any_number=True
)
_FOREIGN: Final = (*PICKLE_SUFFIXES, ".msgpack", ".h5")


@dataclass(frozen=True, slots=True)
class Shards:
    """The weight files of a folder, by name, and its weight_map if it has an index."""

    paths: Mapping[str, Path]
    weight_map: Mapping[str, str] | None


def find_shards(folder: str | os.PathLike[str]) -> Shards:
    """Find `model.safetensors`, or the shards that `model.safetensors.index.json` lists.

    Raises:
        FormatError: SKT-100 to SKT-104, and SKT-006 to SKT-012 for the index's JSON.
        OSError: if the folder is not readable.
    """
    root = Path(folder)
    single, index = os.path.lexists(root / SINGLE_NAME), os.path.lexists(root / INDEX_NAME)
    if single and index:
        refuse("SKT-100", root.name, f"both {SINGLE_NAME} and {INDEX_NAME} are there")
    if single:
        return Shards({SINGLE_NAME: safe_member(root, SINGLE_NAME)}, None)
    if not index:
        refuse("SKT-100", root.name, f"neither {SINGLE_NAME} nor {INDEX_NAME}{_hint(root)}")
    weight_map = _read_index(root)
    names = sorted(set(weight_map.values()))
    for name in names:
        if not _SHARD.fullmatch(name):
            refuse("SKT-102", f"{root.name}/{INDEX_NAME}", f"bad shard name {shown(name)}")
    return Shards({name: safe_member(root, name) for name in names}, weight_map)


def safe_member(root: Path, name: str, missing: str = "SKT-104") -> Path:
    """Return the real path of a regular file of a folder, following only links that may be.

    Raises:
        FormatError: SKT-001, SKT-103, or `missing` if it is not there.
    """
    where = f"{root.name}/{name}"
    try:
        real = (root / name).resolve(strict=True)
        home = root.resolve(strict=True)
    except FileNotFoundError:
        refuse(missing, where, "the file is missing")
    except (OSError, RuntimeError):
        refuse("SKT-103", where, "the link leads in a circle or cannot be followed")
    if not real.is_relative_to(home) and not _in_blobs(real, home):
        refuse("SKT-103", where, "a link leads out of the model's folder")
    if not real.is_file():
        refuse("SKT-001", where, "expected a regular file")
    return real


def read_member(root: Path, name: str, limit: int, requirement: str = "SKT-108") -> bytes:
    """Return the bytes of a small file of a folder.

    Raises:
        FormatError: SKT-001 or SKT-103 as `safe_member`; `requirement` if the file is missing or
            larger than `limit`.
    """
    fd, size = open_regular(safe_member(root, name, requirement))
    try:
        if size > limit:
            refuse(requirement, f"{root.name}/{name}", f"at most {limit} bytes, got {size}")
        return pread_exact(fd, size, 0, f"{root.name}/{name}")
    finally:
        os.close(fd)


def parse_config(raw: bytes, where: str) -> dict[str, Any]:
    """Parse a `config.json`; numbers may be anything that Python's JSON takes.

    Raises:
        FormatError: SKT-108 if it is not one JSON object of bounded depth.
    """
    try:
        value = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError("SKT-108", where, f"not JSON: {shown(str(error))}") from None
    if not isinstance(value, dict):
        refuse("SKT-108", where, f"expected an object, got {type(value).__name__}")
    return value


def _read_index(root: Path) -> dict[str, str]:
    where = f"{root.name}/{INDEX_NAME}"
    raw = read_member(root, INDEX_NAME, rules.MAX_HEADER, "SKT-101")
    weight_map = loads(raw, where, _INDEX_LIMITS).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        refuse("SKT-101", where, f"weight_map must be an object, got {shown(weight_map)}")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            refuse("SKT-101", where, f"{shown(name)} must map to a string, got {shown(shard)}")
    return weight_map


def _in_blobs(real: Path, home: Path) -> bool:
    """Tell whether a link of a cache snapshot `REPO/snapshots/REVISION` ends in `REPO/blobs`."""
    snapshots = home.parent
    return snapshots.name == "snapshots" and real.parent == snapshots.parent / "blobs"


def _hint(root: Path) -> str:
    names = sorted(p.name for p in root.iterdir())
    if rules.ADAPTER_NAME in names:
        return "; this is an adapter folder, a delta: apply it to the sketch it was made for"
    pickles = [n for n in names if n.endswith(_FOREIGN)]
    if pickles:
        return f"; only {shown(pickles)}: pickles and other formats are never loaded"
    other = [n for n in names if n.endswith((".safetensors", ".gguf", ".sktch"))]
    return f"; the folder holds {shown(other)}" if other else ""
