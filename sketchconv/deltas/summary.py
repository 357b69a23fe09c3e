"""What a delta is, in numbers and words."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sketchconv.formats.delta import DeltaFile
from sketchconv.formats.delta_document import DeltaDocument
from sketchconv.formats.delta_record import parameters
from sketchconv.formats.errors import shown
from sketchconv.formats.rules import ADAPTER_CONFIG, ADAPTER_NAME


@dataclass(frozen=True, slots=True)
class DeltaSummary:
    """A delta on disk.

    Args:
        path: the file or folder.
        seal: the digest of its document, which tells it from all others.
        mode, values, span: how it is written, see `formats.delta_coding.Coding`.
        weights: how many weights it changes.
        changed, groups: groups that it changes, and groups of those weights.
        parameters: numbers that it changes.
        nbytes: bytes on disk.
        base, task: what it says of its base and of itself.
        exact: whether the tables that were asked for come back to the bit; None if not known.
        largest_error: the largest difference of an entry from what was asked for.
    """

    path: str
    seal: str
    mode: str
    values: str
    span: int
    weights: int
    changed: int
    groups: int
    parameters: int
    nbytes: int
    base: Mapping[str, Any]
    task: Mapping[str, Any]
    exact: bool | None = None
    largest_error: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "path": self.path,
            "seal": self.seal,
            "mode": self.mode,
            "values": self.values,
            "span": self.span,
            "weights": self.weights,
            "changed_groups": self.changed,
            "groups": self.groups,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "base": dict(self.base),
            "task": dict(self.task),
            "exact": self.exact,
            "largest_error": self.largest_error,
        }


def facts(summary: DeltaSummary) -> list[tuple[str, str]]:
    """What a person wants to know, line by line."""
    base, task = summary.base, summary.task
    values = "the base's dtype" if summary.values == "same" else summary.values
    span = f", a scale for {summary.span} group(s)" if summary.span else ""
    rows = [
        ("task", str(task.get("name") or "unnamed")),
        ("base", f"{base.get('id')} ({base.get('format')})"),
        ("mode", f"{summary.mode}, values in {values}{span}"),
        ("changed weights", f"{summary.weights:,}"),
        ("changed groups", f"{summary.changed:,} of {summary.groups:,}"),
        ("changed numbers", f"{summary.parameters:,}"),
        ("delta size", f"{summary.nbytes:,} bytes"),
        ("seal", summary.seal),
    ]
    if summary.exact is not None:
        text = "yes, to the bit" if summary.exact else f"no, to {summary.largest_error:.3g}"
        rows.append(("exact", text))
    rows += [(f"task {key}", shown(value, 400)) for key, value in task.items() if key != "name"]
    return rows


def info(path: str | os.PathLike[str]) -> DeltaSummary:
    """Read what a delta says of itself; its data is not read.

    Raises:
        FormatError: it breaks a rule, DLT-001 if it is a model.
        OSError: it cannot be read.
    """
    with DeltaFile.open(path) as delta:
        return summary(delta.document, Path(path))


def summary(
    document: DeltaDocument,
    path: Path,
    exact: bool | None = None,
    largest_error: float | None = None,
) -> DeltaSummary:
    """The summary of a delta that lies at `path`."""
    coding, records = document.coding, document.weights.values()
    return DeltaSummary(
        path=str(path),
        seal=document.seal,
        mode=coding.mode,
        values=coding.values,
        span=coding.span,
        weights=len(records),
        changed=sum(r.changed for r in records),
        groups=sum(r.groups for r in records),
        parameters=sum(map(parameters, records)),
        nbytes=_disk_bytes(path),
        base=document.base,
        task=document.task,
        exact=exact,
        largest_error=largest_error,
    )


def _disk_bytes(path: Path) -> int:
    if not path.is_dir():
        return path.stat().st_size
    files = [path / name for name in (ADAPTER_NAME, ADAPTER_CONFIG)]
    return sum(file.stat().st_size for file in files if file.is_file())
