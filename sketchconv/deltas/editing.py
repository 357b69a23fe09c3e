"""What changes in a sketch that is written again: the document in the header of each file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from json.encoder import encode_basestring_ascii
from typing import Any

from sketchconv.errors import DeltaError
from sketchconv.formats import rules
from sketchconv.formats.delta_coding import Table
from sketchconv.formats.laid_file import FileLayout
from sketchconv.formats.manifest import Manifest
from sketchconv.formats.reader import SktchFile, SktchModel


@dataclass(frozen=True, slots=True)
class Edit:
    """What changes in a sketch.

    Args:
        tables: weight -> digest of its new table.
        errors: weight -> its new error metric.
        extensions: the document's new extensions.
        headers: file -> length of its header, where it is not the one that Writers give it.
        table: gives the new table of a weight, `[out, G, K]` in its carrier.
    """

    tables: Mapping[str, str]
    errors: Mapping[str, float | None]
    extensions: Mapping[str, Any]
    headers: Mapping[str, int]
    table: Callable[[str], Table]


def layouts(model: SktchModel, edit: Edit) -> dict[str, FileLayout]:
    """Lay out every weight file of the new sketch.

    Raises:
        DeltaError: a header cannot be written again.
    """
    names = {model.manifest.sketches[w].lut_name: d for w, d in edit.tables.items()}
    return {
        file: _layout(file, shard, _edited(shard.manifest, names, edit), edit.headers.get(file))
        for file, shard in model.shards.items()
    }


def padded_length(text: bytes) -> int:
    """The length of a header that a Writer gives to a text (SKT-031)."""
    whole = -(-(rules.LENGTH_BYTES + len(text)) // rules.ALIGNMENT) * rules.ALIGNMENT
    return whole - rules.LENGTH_BYTES


def odd_headers(model: SktchModel) -> dict[str, int]:
    """Length of each header that is not padded as Writers do, by file."""
    lengths = {f: s.container.data_begin - rules.LENGTH_BYTES for f, s in model.shards.items()}
    return {f: n for f, n in lengths.items() if n != padded_length(_text(model.shards[f]))}


def _edited(manifest: Manifest, digests: Mapping[str, str], edit: Edit) -> Manifest:
    return replace(
        manifest,
        digests={name: digests.get(name, d) for name, d in manifest.digests.items()},
        errors={name: edit.errors.get(name, e) for name, e in manifest.errors.items()},
        extensions=edit.extensions,
    )


def _layout(file: str, shard: SktchFile, manifest: Manifest, length: int | None) -> FileLayout:
    header = _header(file, shard, manifest, length)
    shift = len(header) - shard.container.data_begin
    entries = shard.container.entries
    return FileLayout(
        header,
        {name: entry.begin + shift for name, entry in entries.items()},
        {name: entry.info.nbytes for name, entry in entries.items()},
        shard.container.size + shift,
    )


def _header(file: str, shard: SktchFile, manifest: Manifest, length: int | None) -> bytes:
    """The header with another document in it; everything else in it stays as it is."""
    text = _text(shard)
    old = encode_basestring_ascii(shard.container.metadata[rules.DOCUMENT_KEY]).encode()
    if text.count(old) != 1:
        raise DeltaError(f"{file}: its document is written in an odd way; convert the sketch again")
    text = text.replace(old, encode_basestring_ascii(manifest.to_json()).encode())
    size = padded_length(text) if length is None else length
    if not len(text) <= size <= rules.MAX_HEADER:
        raise DeltaError(f"{file}: {len(text)} bytes of header do not fit in {size}")
    return size.to_bytes(rules.LENGTH_BYTES, "little") + text.ljust(size, b" ")


def _text(shard: SktchFile) -> bytes:
    return shard.container.header()[rules.LENGTH_BYTES :].rstrip(b" ")
