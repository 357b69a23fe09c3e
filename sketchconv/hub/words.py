"""Facts of a model in words, as a model card shows them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from sketchconv.hub.contents import Model
from sketchconv.sources.hub import is_hub_id

if TYPE_CHECKING:
    from sketchconv.formats.manifest import Manifest

_LICENCES: Final = ((b"Apache License", "apache-2.0"), (b"MIT License", "mit"))
_HEAD: Final = 400
_TASKS: Final = (
    ("ForCausalLM", "text-generation"),
    ("LMHeadModel", "text-generation"),
    ("ForMaskedLM", "fill-mask"),
    ("ForSequenceClassification", "text-classification"),
    ("ForTokenClassification", "token-classification"),
    ("ForQuestionAnswering", "question-answering"),
)


def method(manifest: Manifest) -> str:
    """How a sketch was made, by its recipe."""
    recipe = manifest.recipe
    grids = sorted({record.grid for record in manifest.sketches.values()})
    tables = "lookup tables per row group" if grids in ([], ["free"]) else ", ".join(grids)
    calibration = recipe.get("calibration")
    how = str(recipe.get("column_weights") or recipe.get("weighting") or "")
    if isinstance(calibration, dict):
        how = f"calibrated ({calibration.get('method')})"
        if isinstance(calibration.get("recover"), int) and calibration["recover"]:
            how += f", recovered on {calibration['recover']:,} tokens"
    return f"{tables}; {how}" if how and how != "None" else tables


def groups(manifest: Manifest) -> str:
    """Groups of each row, or their width where there are many, the usual first."""
    spans = Counter[str]()
    for record in manifest.sketches.values():
        size = record.shape[0] * record.shape[1]
        spans[f"{record.groups}" if record.groups <= 8 else f"of {record.group_size} columns"] += (
            size
        )
    return ", ".join(name for name, _ in spans.most_common()) or "none"


def calibration(recipe: Mapping[str, Any]) -> str:
    """The texts that a recipe names, and how much of them was read."""
    found = recipe.get("calibration")
    if not isinstance(found, dict):
        return "none"
    texts = found.get("texts")
    names = ", ".join(map(str, texts)) if isinstance(texts, list) and texts else "self-written text"
    return f"{names}; {found.get('tokens')} tokens in windows of {found.get('seq_len')}"


def license_of(text: bytes) -> str | None:
    """The identifier of a licence by the head of its text; None if it is none of the usual."""
    head = text[:_HEAD]
    return next((name for mark, name in _LICENCES if mark in head), None)


def origin(source: Mapping[str, Any]) -> str:
    """What a document says of its source."""
    revision = f", revision {source['revision']}" if source.get("revision") else ""
    return f"{shown_name(source.get('id'))} ({source.get('format')}{revision})"


def figures(model: Model, parameters: int) -> list[tuple[str, str]]:
    """Rows on parameters, bytes and bits per weight."""
    bits = 8 * model.nbytes / max(1, parameters)
    return [
        ("Parameters", f"{parameters:,}"),
        ("Size", f"{model.nbytes:,} bytes in {len(model.files)} file(s)"),
        ("Bits per weight", f"{bits:.3f}, all files over all parameters"),
    ]


def shares(counts: Counter[Any]) -> str:
    """What most weights have first; shares only where they differ."""
    total = max(1, sum(counts.values()))
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{name} ({100 * n / total:.1f} %)" for name, n in counts.most_common() if n)


def task_of(config: Mapping[str, Any], model: Model) -> str | None:
    """The pipeline tag by the class of the model; None if not known."""
    if any(file.name == "config_sentence_transformers.json" for file in model.others):
        return "sentence-similarity"
    names = config.get("architectures")
    for name in names if isinstance(names, list) else []:
        for end, task in _TASKS:
            if isinstance(name, str) and name.endswith(end):
                return task
    return None


def hub_id(value: Any) -> str | None:
    """The value if it is a hub id, else None."""
    return value if isinstance(value, str) and is_hub_id(value) else None


def shown_name(value: Any) -> str:
    """A source as it may be shown: a hub id, or the last part of a path."""
    text = str(value) if value else "unknown"
    return text if is_hub_id(text) else text.replace("\\", "/").rstrip("/").rpartition("/")[2]
