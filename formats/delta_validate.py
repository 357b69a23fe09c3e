"""Validate a delta: every rule of its reader, then every byte of every tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from sketchconv.formats import rules
from sketchconv.formats.delta import DeltaFile
from sketchconv.formats.delta_record import DeltaRecord
from sketchconv.formats.delta_writer import adapter_config
from sketchconv.formats.errors import FormatError
from sketchconv.formats.folder import MAX_CONFIG, parse_config, read_member
from sketchconv.formats.header import canonical_header, data_order
from sketchconv.formats.rules import ADAPTER_CONFIG
from sketchconv.formats.validate import Finding


def validate_delta(
    path: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None
) -> Iterator[Finding]:
    """Check everything that `spec/delta.md` asks of a delta by itself, without its base.

    Args:
        path: a file or an adapter folder.
        progress: called with the bytes done and the bytes in all.

    Yields:
        Each broken requirement; nothing for a valid delta.

    Raises:
        OSError: if something is missing or not readable.
    """
    try:
        delta = DeltaFile.open(path)
    except FormatError as error:
        yield _finding(error)
        return
    with delta:
        yield from _check_config(delta)
        yield from _check_header(delta)
        document = delta.document
        sizes = {n: sum(i.nbytes for i in r.infos(document.coding)) for n, r in _items(delta)}
        total, done = sum(sizes.values()), 0
        for name, record in _items(delta):
            for check in (delta.packed_groups, delta.values):
                try:
                    check(record)
                except FormatError as error:
                    yield _finding(error)
            done += sizes[name]
            if progress is not None:
                progress(done, total)


def _items(delta: DeltaFile) -> list[tuple[str, DeltaRecord]]:
    return sorted(delta.document.weights.items())


def _finding(error: FormatError) -> Finding:
    return Finding(error.requirement, error.where, error.message)


def _check_header(delta: DeltaFile) -> Iterator[Finding]:
    container = delta.container
    where, metadata = container.path.name, container.metadata
    for key in metadata.keys() - {"format", rules.DOCUMENT_KEY}:
        yield Finding("SKT-043", where, f"unexpected metadata {key[:80]!r}")
    infos = [entry.info for entry in container.entries.values()]
    if infos != data_order(infos):
        yield Finding("SKT-030", where, "the tensors are not in canonical order")
    elif canonical_header(metadata, infos) != container.header():
        yield Finding("SKT-031", where, "the header is not in canonical form")


def _check_config(delta: DeltaFile) -> Iterator[Finding]:
    """The adapter folder's config says what the document says, besides what others add to it."""
    root = Path(delta.path)
    if not root.is_dir():
        return
    where = f"{root.name}/{ADAPTER_CONFIG}"
    try:
        config = parse_config(read_member(root, ADAPTER_CONFIG, MAX_CONFIG, "DLT-051"), where)
    except FormatError as error:
        yield Finding("DLT-051", error.where, error.message)
        return
    for key, value in json.loads(adapter_config(delta.document)).items():
        if key not in config or config[key] != value:
            yield Finding("DLT-051", where, f"{key} is not what the delta says")
            return
