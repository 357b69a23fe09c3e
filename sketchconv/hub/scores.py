"""The evaluation of `sketchconv eval --json` as a table for a model card."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from sketchconv.errors import HubError
from sketchconv.hub.markdown import plain
from sketchconv.sources.hub import is_hub_id

_MAX_BYTES: Final = 16 << 20
_HEAD: Final = ("Model", "Bits/weight", "Text", "Perplexity", "KL to the reference", "Same top-1")


def read_scores(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and check a file that `sketchconv eval --json` wrote.

    Raises:
        HubError: it cannot be read, or is no such file.
    """
    try:
        with Path(path).open("rb") as file:
            value = json.loads(file.read(_MAX_BYTES))
        score_lines(value)
    except OSError as error:
        raise HubError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise HubError(f"{path}: not what `sketchconv eval --json` prints") from None
    return dict(value)


def score_lines(value: Mapping[str, Any]) -> list[str]:
    """The lines of a Markdown table, and how it was measured.

    Raises:
        LookupError, TypeError, ValueError: the value is no evaluation.
    """
    if not value["models"]:
        raise ValueError("no models")
    models = [*([value["reference"]] if value["reference"] else []), *value["models"]]
    rows = [row for model in models for row in _text_rows(model)]
    cut = value["cut"]
    lines: list[str] = []
    if rows:
        lines = ["| " + " | ".join(row) + " |" for row in (_HEAD, ("---",) * len(_HEAD), *rows)]
        stride = int(cut["stride"] or cut["seq_len"])
        lines += [
            "",
            f"Windows of {int(cut['seq_len'])} tokens, stride {stride}, "
            f"{int(models[0]['texts'][0]['windows'])} of them. KL in nats per token, "
            "+- standard error.",
        ]
    return lines + [line for model in models for line in _choice_lines(model)]


def _text_rows(model: Mapping[str, Any]) -> list[tuple[str, ...]]:
    bits = model["bits_per_weight"]
    rows: list[tuple[str, ...]] = []
    for text in model["texts"]:
        found = text["divergence"]
        rows.append(
            (
                _name(model["model"]),
                "" if bits is None else f"{float(bits):.2f}",
                plain(text["text"]),
                _number(text["perplexity"], 3),
                "" if found is None else _spread(found["kl"], 1, 4),
                "" if found is None else f"{_spread(found['agreement'], 100, 1)} %",
            )
        )
    return rows


def _choice_lines(model: Mapping[str, Any]) -> list[str]:
    found = model["choices"]
    if found is None:
        return []
    right = f"{100 * float(found['accuracy']):.1f} +- {100 * float(found['error']):.1f} %"
    return ["", f"{_name(model['model'])}: {int(found['questions'])} questions, {right} right."]


def _spread(value: Mapping[str, Any], scale: float, digits: int) -> str:
    error = value["error"]
    spread = "" if error is None else f" +- {scale * float(error):.{digits}f}"
    return f"{_number(value['mean'], digits, scale)}{spread}"


def _number(value: Any, digits: int, scale: float = 1) -> str:
    return "infinite" if value is None else f"{scale * float(value):.{digits}f}"


def _name(value: Any) -> str:
    """A hub id, or the last part of a path: folders of the machine are nobody's business."""
    text = str(value)
    last = text if is_hub_id(text) and not Path(text).exists() else Path(text).name
    return plain(last)
