"""The document: one canonical JSON text under the metadata key `sktch`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from sketchconv.formats import rules
from sketchconv.formats.digest import ZERO_DIGEST
from sketchconv.formats.document import (
    LIMITS,
    check_extensions,
    check_seal,
    is_digest,
    major_of,
    sealed,
)
from sketchconv.formats.errors import refuse, shown
from sketchconv.formats.paths import check_paths
from sketchconv.formats.sketches import SketchRecord
from sketchconv.formats.strict_json import Fixed, dumps, loads

__all__ = ["Manifest", "SketchRecord"]

MEMBERS: Final = frozenset(
    {"aliases", "digests", "errors", "extensions", "files", "kind", "packing", "recipe", "seal"}
    | {"sentinel", "sketches", "source", "tool", "version"}
)
_NAME: Final = re.compile(rules.NAME_PATTERN)


@dataclass(frozen=True)
class Manifest:
    """All that a file says about itself, besides the container's own header.

    Args:
        sketches: the record of each sketched weight, by its name.
        digests: the digest of every stored tensor, see `formats.digest`.
        errors: for each sketch the relative Frobenius error `|W - Q| / |W|`, None if unknown.
        aliases: absent weight name -> the weight that it shares (tied weights).
        files: relative POSIX path -> stored tensor; an empty file maps to an empty string.
        sentinel: the dense name that a sentinel tensor bears; None without sketches.
        recipe: free JSON of strings, integers, booleans, nulls, arrays and objects.
        source: as `recipe`; `digest`, when there, is 64 hexadecimal digits.
        tool: the program and version that wrote the file.
        version: format version `MAJOR.MINOR`.
        kind: `"model"`.
        packing: `"planes-le"`.
        extensions: namespaced members that never affect decoding.
        unknown: members that a later minor version added, kept as they are.
    """

    sketches: Mapping[str, SketchRecord] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, float | None] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    sentinel: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    tool: str = ""
    version: str = rules.FORMAT_VERSION
    kind: str = rules.KIND_MODEL
    packing: str = rules.PACKING
    extensions: Mapping[str, Any] = field(default_factory=dict)
    unknown: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the canonical text (SKT-050), sealed (SKT-055).

        Raises:
            TypeError, ValueError: if a value has no canonical form, such as a float in `recipe`.
        """
        return sealed(self._members())

    def _members(self) -> dict[str, str]:
        errors = {k: None if e is None else Fixed.of(e) for k, e in self.errors.items()}
        values: dict[str, Any] = {
            "aliases": dict(self.aliases),
            "digests": dict(self.digests),
            "errors": errors,
            "extensions": dict(self.extensions),
            "files": dict(self.files),
            "kind": self.kind,
            "packing": self.packing,
            "recipe": dict(self.recipe),
            "sentinel": self.sentinel,
            "sketches": {k: r.to_value() for k, r in self.sketches.items()},
            "source": dict(self.source),
            "tool": self.tool,
            "version": self.version,
            **self.unknown,
        }
        return {key: dumps(value) for key, value in values.items()}

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """Read a document strictly.

        Args:
            text: the value of the metadata key `sktch`.
            where: the file, for the error.

        Raises:
            FormatError: SKT-006 to SKT-012 for the JSON, SKT-050 to SKT-066, SKT-080, SKT-082,
                SKT-085, SKT-090, SKT-091 and SKT-093 for what one document can break by itself.
        """
        at = f"{where}: document"
        value = loads(text.encode("utf-8", "surrogatepass"), at, LIMITS)
        _check_identity(value, at)
        check_seal(value, text, at)
        for member in ("aliases", "digests", "errors", "files", "sketches"):
            if not isinstance(value[member], dict):
                refuse("SKT-051", at, f"{member} must be an object, got {shown(value[member])}")
        _check_free(value, at)
        version, own = value["version"], at
        if version not in rules.KNOWN_VERSIONS:
            own = f"{at} of version {version}, later than this reader's {rules.SHAPED_VERSION}"
        shaped = version != rules.FORMAT_VERSION
        manifest = cls(
            sketches={
                k: SketchRecord.from_value(k, v, own, shaped=shaped)
                for k, v in value["sketches"].items()
            },
            unknown={k: v for k, v in value.items() if k not in MEMBERS},
            **{k: value[k] for k in MEMBERS - {"seal", "sketches"}},
        )
        manifest.check(where)
        return manifest

    def check(self, where: str) -> None:
        """Check what the document must fulfil by itself, without the tensors.

        Raises:
            FormatError: SKT-060 to SKT-066, SKT-073, SKT-075, SKT-080, SKT-082, SKT-085, SKT-090
                to SKT-093.
        """
        at = f"{where}: document"
        for record in self.sketches.values():
            record.check(at)
            if record.shaped and self.version == rules.FORMAT_VERSION:
                refuse("SKT-061", at, f"{shown(record.name)}: no grid in version {self.version}")
        for name, digest in self.digests.items():
            if not is_digest(digest):
                refuse("SKT-080", f"{at}: digest of {shown(name)}", f"bad digest {shown(digest)}")
        if self.errors.keys() != self.sketches.keys():
            odd = sorted(self.errors.keys() ^ self.sketches.keys())
            refuse("SKT-082", at, f"errors and sketches differ in {shown(odd)}")
        for name, error in self.errors.items():
            if error is not None and not isinstance(error, float):
                refuse("SKT-082", f"{at}: error of {shown(name)}", f"bad error {shown(error)}")
        sentinel = self.sentinel
        if sentinel is not None and not (isinstance(sentinel, str) and sentinel in self.sketches):
            refuse("SKT-075", at, f"the sentinel {shown(sentinel)} is not a sketch")
        if self.sentinel is None and self.sketches:
            refuse("SKT-075", at, "sketches without a sentinel")
        for name, target in self.aliases.items():
            if not _NAME.fullmatch(name) or not isinstance(target, str):
                refuse("SKT-085", at, f"bad alias {shown(name)} -> {shown(target)}")
        check_paths(self.files, at)


def _check_identity(value: dict[str, Any], at: str) -> None:
    version = value.get("version")
    if major_of(version) != rules.FORMAT_MAJOR:
        refuse("SKT-052", at, f"version {shown(version)}; this reader knows {rules.FORMAT_MAJOR}.x")
    if value.get("kind") == rules.KIND_DELTA:
        refuse(
            "SKT-053", at, "this is a delta, not a model: apply it to the sketch it was made for"
        )
    missing, unknown = sorted(MEMBERS - value.keys()), sorted(value.keys() - MEMBERS)
    if missing or (unknown and version in rules.KNOWN_VERSIONS):
        refuse("SKT-051", at, f"members missing: {shown(missing)}, unknown: {shown(unknown)}")
    if value["kind"] != rules.KIND_MODEL:
        refuse("SKT-053", at, f"unknown kind {shown(value['kind'])}")
    if value["packing"] != rules.PACKING:
        refuse("SKT-054", at, f"unknown packing {shown(value['packing'])}")


def _check_free(value: dict[str, Any], at: str) -> None:
    source = value["source"]
    if not isinstance(value["tool"], str):
        refuse("SKT-056", at, f"tool must be a string, got {shown(value['tool'])}")
    if not isinstance(value["recipe"], dict) or not isinstance(source, dict):
        refuse("SKT-056", at, "recipe and source must be objects")
    digest = source.get("digest", ZERO_DIGEST)
    if not is_digest(digest):
        refuse("SKT-056", at, f"source.digest must be 64 hexadecimal digits, got {shown(digest)}")
    check_extensions(value["extensions"], at)
