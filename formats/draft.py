"""What is known before a weight is read: the draft of a file, its exact layout and size."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from sketchconv.formats import rules
from sketchconv.formats.coverage import check_tensors
from sketchconv.formats.digest import ZERO_DIGEST
from sketchconv.formats.errors import refuse, shown
from sketchconv.formats.header import canonical_header, data_order
from sketchconv.formats.manifest import Manifest
from sketchconv.formats.sentinel import sentinel_name
from sketchconv.formats.sketches import SketchRecord
from sketchconv.formats.tensors import SKTCH_DTYPES, TensorInfo

_NAME: Final = re.compile(rules.NAME_PATTERN)


@dataclass(frozen=True, slots=True)
class Draft:
    """All that metadata alone tells about an output.

    Args:
        sketches: the records of the weights to sketch.
        plain: the tensors to store as they are.
        aliases: absent weight name -> the sketch or plain tensor that it shares.
        recipe, source: free JSON without fractions; `source["digest"]` is filled at commit.
        tool: program and version.
    """

    sketches: tuple[SketchRecord, ...] = ()
    plain: tuple[TensorInfo, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    tool: str = "sketchconv"


@dataclass(frozen=True, slots=True)
class Results:
    """What only the run itself tells: an error for each sketch, and the source's SHA-256."""

    errors: Mapping[str, float]
    source_digest: str


@dataclass(frozen=True)
class Layout:
    """One file to the byte: its document with zeros for what is not known yet, and its tensors.

    Args:
        manifest: digests, errors and the source's digest are zero.
        infos: every stored tensor in the order of the data.
        begin: the absolute offset of each tensor.
        data_begin: where the data starts, a multiple of 64.
        size: bytes of the file.
    """

    manifest: Manifest
    infos: Mapping[str, TensorInfo]
    begin: Mapping[str, int]
    data_begin: int
    size: int

    def header(self, manifest: Manifest) -> bytes:
        """Return length and header for the final document; always `data_begin` bytes."""
        metadata = {"format": "pt", rules.DOCUMENT_KEY: manifest.to_json()}
        return canonical_header(metadata, self.infos.values())

    def results(self, digests: Mapping[str, str], results: Results) -> Manifest:
        """Return the document with its digests and this file's part of the results."""
        return replace(
            self.manifest,
            digests=dict(digests),
            errors={name: float(results.errors[name]) for name in self.manifest.sketches},
            source={**self.manifest.source, "digest": results.source_digest},
        )


def bundle_layout(draft: Draft, files: Mapping[str, bytes]) -> Layout:
    """Lay out a bundle: one file with everything.

    Raises:
        FormatError: if the draft breaks a requirement.
        TypeError, ValueError: if recipe or source have no canonical form.
    """
    names = {path: f"{rules.FILE_PREFIX}{i:04d}" for i, path in enumerate(sorted(files))}
    tensors = {path: name if files[path] else "" for path, name in names.items()}
    infos = [TensorInfo(tensors[p], "U8", (len(files[p]),)) for p in sorted(files) if files[p]]
    return file_layout(
        draft, draft.sketches, (*draft.plain, *infos), draft.aliases, tensors, "bundle"
    )


def bundle_size(draft: Draft, files: Mapping[str, bytes]) -> int:
    """Return the exact bytes of the bundle on disk. Raises as `bundle_layout`."""
    return bundle_layout(draft, files).size


def file_layout(
    draft: Draft,
    sketches: Iterable[SketchRecord],
    plain: Iterable[TensorInfo],
    aliases: Mapping[str, str],
    files: Mapping[str, str],
    where: str,
) -> Layout:
    """Lay out one file that holds a part of a draft, or all of it.

    Args:
        draft: for recipe, source and tool.
        sketches, plain, aliases: what the file holds.
        files: relative POSIX path -> tensor among `plain`; an empty file has an empty name.
        where: the file, for the error.

    Raises:
        FormatError, TypeError, ValueError: as for `bundle_layout`.
    """
    records = {r.name: r for r in sketches}
    for record in records.values():
        record.check(where)
    sentinel = sentinel_name(records, draft.source)
    infos = [i for r in records.values() for i in (r.index_info, r.lut_info)]
    infos += [records[sentinel].sentinel_info] if sentinel else []
    ordered = data_order([*infos, *plain])
    _check_infos(ordered, where)
    stored = {i.name: i for i in ordered}
    manifest = Manifest(
        sketches=records,
        digests=dict.fromkeys(stored, ZERO_DIGEST),
        errors=dict.fromkeys(records, 0.0),
        aliases=dict(aliases),
        files=dict(files),
        sentinel=sentinel,
        recipe=draft.recipe,
        source={**draft.source, "digest": ZERO_DIGEST},
        tool=draft.tool,
        # Of the whole draft: all shards have one version (SKT-106).
        version=rules.SHAPED_VERSION
        if any(r.shaped for r in draft.sketches)
        else rules.FORMAT_VERSION,
    )
    manifest.check(where)
    check_tensors(manifest, stored, where)
    return _measure(manifest, stored, where)


def _measure(manifest: Manifest, stored: Mapping[str, TensorInfo], where: str) -> Layout:
    metadata = {"format": "pt", rules.DOCUMENT_KEY: manifest.to_json()}
    data_begin = len(canonical_header(metadata, stored.values()))
    if data_begin - rules.LENGTH_BYTES > rules.MAX_HEADER:
        refuse(
            "SKT-003",
            where,
            f"the header takes {data_begin - rules.LENGTH_BYTES} bytes, at most "
            f"{rules.MAX_HEADER} are allowed; write a folder with smaller shards",
        )
    begin, at = {}, data_begin
    for name, info in stored.items():
        begin[name] = at
        at += info.nbytes
    return Layout(manifest, stored, begin, data_begin, at)


def _check_infos(infos: list[TensorInfo], where: str) -> None:
    if len(infos) > rules.MAX_TENSORS:
        refuse("SKT-020", where, f"at most {rules.MAX_TENSORS} tensors, got {len(infos)}")
    seen: set[str] = set()
    for info in infos:
        at = f"{where}: {shown(info.name)}"
        if not _NAME.fullmatch(info.name):
            refuse("SKT-021", at, "bad tensor name")
        if info.name in seen:
            refuse("SKT-009", at, "the tensor is named twice")
        if info.dtype not in SKTCH_DTYPES:
            refuse("SKT-023", at, f"dtype {shown(info.dtype)} cannot be stored")
        if len(info.shape) > rules.MAX_RANK:
            refuse("SKT-024", at, f"at most {rules.MAX_RANK} dimensions, got {len(info.shape)}")
        if any(d < 1 for d in info.shape):
            refuse("SKT-025", at, f"a dimension must be at least 1, got {list(info.shape)}")
        seen.add(info.name)
