"""What a GGUF file says of itself: name, author, licence, base model, and how it was made."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from sketchconv.formats import gguf_values as v
from sketchconv.formats.gguf_types import FILE_TYPES

QUANTIZATION_VERSION: Final = 2
_MAX_CARD: Final = 1 << 20
_HUB: Final = "https://huggingface.co/"
_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")


def general_keys(
    architecture: str,
    name: str,
    parameters: int,
    main_type: str,
    card: Mapping[str, Any],
    source: str,
) -> dict[str, bytes]:
    """The keys below `general.`, the architecture first, as readers expect.

    Args:
        architecture: `general.architecture`.
        name: of the model.
        parameters: in all tensors.
        main_type: of most parameters.
        card: the front matter of the model's card, empty without one.
        source: hub id of the source, or its name.
    """
    values = {
        "general.architecture": v.string(architecture),
        "general.type": v.string("model"),
        "general.name": v.string(name),
        "general.size_label": v.string(size_label(parameters)),
        **card_keys(card),
    }
    if _HUB_ID.fullmatch(source):
        values["general.organization"] = v.string(source.split("/")[0])
        values["general.source.url"] = v.string(_HUB + source)
    return {**values, **type_keys(main_type)}


def type_keys(main_type: str) -> dict[str, bytes]:
    """The keys that say how a file is quantized."""
    values = {"general.quantization_version": v.uint32(QUANTIZATION_VERSION)}
    if main_type in FILE_TYPES:
        values["general.file_type"] = v.uint32(FILE_TYPES[main_type])
    return values


def provenance_keys(
    source_id: str, source_format: str, types: Mapping[str, int], origin: Mapping[str, Any]
) -> dict[str, bytes]:
    """How the file was made: our own keys, which other programs pass over.

    Args:
        source_id: name of what was exported.
        source_format: its format.
        types: parameters by type.
        origin: for a sketch, what it was made from, and its recipe.
    """
    from sketchconv import __version__

    values = {
        "general.quantized_by": v.string(f"sketchconv {__version__}"),
        "sketchconv.source": v.string(_printable(source_id)),
        "sketchconv.source_format": v.string(source_format),
        "sketchconv.types": v.string(json.dumps(dict(types))),
    }
    for key, value in origin.items():
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        values[f"sketchconv.{key}"] = v.string(_printable(text))
    return values


def card_keys(card: Mapping[str, Any]) -> dict[str, bytes]:
    """Keys from the front matter of a model card: licence, author, languages, tags, base models."""
    values: dict[str, bytes] = {}
    for field, key in (
        ("license", "general.license"),
        ("license_name", "general.license.name"),
        ("license_link", "general.license.link"),
        ("author", "general.author"),
    ):
        text = card.get(field)
        if isinstance(text, str) and text:
            values[key] = v.string(text)
    for field, key in (("tags", "general.tags"), ("language", "general.languages")):
        names = _texts(card.get(field))
        if names:
            values[key] = v.strings(names)
    bases = _texts(card.get("base_model"))
    if bases:
        values["general.base_model.count"] = v.uint32(len(bases))
    for number, base in enumerate(bases):
        at = f"general.base_model.{number}"
        values[f"{at}.name"] = v.string(base.rpartition("/")[2])
        if _HUB_ID.fullmatch(base):
            values[f"{at}.organization"] = v.string(base.split("/")[0])
            values[f"{at}.repo_url"] = v.string(_HUB + base)
    return values


def read_card(folder: Path | None) -> dict[str, Any]:
    """The front matter of a folder's README.md; empty without one that can be read.

    A card is a courtesy of its author: a broken one is no reason to refuse a model.
    """
    if folder is None:
        return {}
    try:
        with (folder / "README.md").open("rb") as file:
            text = file.read(_MAX_CARD).decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    match = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", text, re.DOTALL)
    if match is None:
        return {}
    import yaml

    try:
        value = yaml.safe_load(match[1])
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def model_name(source_id: str) -> str:
    """A model's name from a hub id, a folder's or a file's name.

    >>> model_name("org/Tiny-Model-1B.sktch")
    'Tiny-Model-1B'
    """
    last = _printable(source_id).rstrip("/").rpartition("/")[2]
    return re.sub(r"\.(sktch|gguf|safetensors)$", "", last, flags=re.IGNORECASE) or "model"


def size_label(parameters: int) -> str:
    """A number of parameters as in model names.

    >>> size_label(134_515_008)
    '135M'
    """
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if parameters >= size:
            value = parameters / size
            return f"{value:.1f}{unit}" if value < 10 and unit != "M" else f"{value:.0f}{unit}"
    return str(parameters)


def _texts(value: Any) -> list[str]:
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, str) and item]


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
