"""The document of a delta: what it is bound to, how it is written, and what it is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from sketchconv.formats import rules
from sketchconv.formats.delta_coding import Coding
from sketchconv.formats.delta_record import DeltaRecord
from sketchconv.formats.document import (
    LIMITS,
    check_extensions,
    check_seal,
    is_digest,
    major_of,
    sealed,
)
from sketchconv.formats.errors import refuse, shown
from sketchconv.formats.strict_json import dumps, loads
from sketchconv.formats.tensors import TensorInfo

DELTA_MEMBERS: Final = frozenset(
    {"base", "digests", "extensions", "kind", "mode", "seal", "span"}
    | {"task", "tool", "values", "version", "weights"}
)


@dataclass(frozen=True)
class DeltaDocument:
    """All that a delta says about itself.

    Args:
        weights: the record of each weight that it changes, by its name.
        coding: mode, value type and span.
        digests: the digest of every stored tensor.
        base: free JSON: what the base is; never decides whether a delta fits.
        task: free JSON: name, description, data, training.
        tool: the program and version that wrote it.
        extensions: namespaced members that never affect decoding.
        version: of the delta format.
        unknown: members that a later minor version added.
    """

    weights: Mapping[str, DeltaRecord] = field(default_factory=dict)
    coding: Coding = field(default_factory=Coding)
    digests: Mapping[str, str] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)
    tool: str = ""
    extensions: Mapping[str, Any] = field(default_factory=dict)
    version: str = rules.DELTA_VERSION
    unknown: Mapping[str, Any] = field(default_factory=dict)

    def infos(self) -> dict[str, TensorInfo]:
        """Every tensor that is stored, by name."""
        records = self.weights.values()
        return {info.name: info for r in records for info in r.infos(self.coding)}

    def to_json(self) -> str:
        """Return the canonical text (SKT-050), sealed (SKT-055).

        Raises:
            TypeError, ValueError: if a value has no canonical form.
        """
        values: dict[str, Any] = {
            "base": dict(self.base),
            "digests": dict(self.digests),
            "extensions": dict(self.extensions),
            "kind": rules.KIND_DELTA,
            "mode": self.coding.mode,
            "span": self.coding.span,
            "task": dict(self.task),
            "tool": self.tool,
            "values": self.coding.values,
            "version": self.version,
            "weights": {name: r.to_value() for name, r in self.weights.items()},
            **self.unknown,
        }
        return sealed({key: dumps(value) for key, value in values.items()})

    @property
    def seal(self) -> str:
        """The digest of the document: it tells one delta from all others."""
        text = loads(self.to_json().encode("ascii"), "document", LIMITS)["seal"]
        return str(text)

    @classmethod
    def from_json(cls, text: str, where: str) -> DeltaDocument:
        """Read a document strictly.

        Args:
            text: the value of the metadata key `sktch`.
            where: the file, for the error.

        Raises:
            FormatError: SKT-006 to SKT-012 for the JSON, SKT-050, SKT-055, SKT-057, SKT-080,
                DLT-001 to DLT-016.
        """
        at = f"{where}: document"
        value = loads(text.encode("utf-8", "surrogatepass"), at, LIMITS)
        _check_identity(value, at)
        check_seal(value, text, at)
        for member in ("digests", "weights"):
            if not isinstance(value[member], dict):
                refuse("DLT-003", at, f"{member} must be an object, got {shown(value[member])}")
        _check_free(value, at)
        for member, requirement in (("mode", "DLT-004"), ("values", "DLT-005")):
            if not isinstance(value[member], str):
                got = shown(value[member])
                refuse(requirement, at, f"{member} must be a string, got {got}")
        weights = {k: DeltaRecord.from_value(k, v, at) for k, v in value["weights"].items()}
        document = cls(
            weights=weights,
            coding=Coding(value["mode"], value["values"], value["span"]),
            unknown={k: v for k, v in value.items() if k not in DELTA_MEMBERS},
            **{k: value[k] for k in ("base", "digests", "extensions", "task", "tool", "version")},
        )
        document.check(where)
        return document

    def check(self, where: str) -> None:
        """Check what the document must fulfil by itself, without the tensors.

        Raises:
            FormatError: SKT-080, DLT-004 to DLT-006, DLT-010 to DLT-016.
        """
        at = f"{where}: document"
        self.coding.check(at)
        for record in self.weights.values():
            record.check(at)
        for name, digest in self.digests.items():
            if not is_digest(digest):
                refuse("SKT-080", f"{at}: digest of {shown(name)}", f"bad digest {shown(digest)}")

    def check_tensors(self, stored: Mapping[str, TensorInfo], where: str) -> None:
        """Check the document against the tensors of its file.

        Raises:
            FormatError: SKT-080, DLT-020 to DLT-023.
        """
        wanted = self.infos()
        for record in self.weights.values():
            _check_presence(record, self.coding, stored, where)
        for name in stored:
            if name not in wanted:
                refuse("DLT-023", f"{where}: {name}", "a delta holds nothing but changed tables")
        for name in sorted(self.digests.keys() ^ stored.keys()):
            what = "has no digest" if name in stored else "has a digest, but is not stored"
            refuse("SKT-080", f"{where}: {shown(name)}", what)


def _check_presence(
    record: DeltaRecord, coding: Coding, stored: Mapping[str, TensorInfo], where: str
) -> None:
    wanted = {info.name: info for info in record.infos(coding)}
    for requirement, name in (
        ("DLT-020", record.lut_name),
        ("DLT-021", record.groups_name),
        ("DLT-022", record.scale_name),
    ):
        want, found = wanted.get(name), stored.get(name)
        if want != found:
            texts = [f"{i.dtype} {list(i.shape)}" if i else "nothing" for i in (want, found)]
            refuse(requirement, f"{where}: {name}", f"expected {texts[0]}, got {texts[1]}")


def _check_identity(value: dict[str, Any], at: str) -> None:
    kind, version = value.get("kind"), value.get("version")
    if kind != rules.KIND_DELTA:
        what = "this is a model, not a delta" if kind == rules.KIND_MODEL else "unknown kind"
        refuse("DLT-001", at, f"{what}: expected kind 'delta', got {shown(kind)}")
    if major_of(version) != rules.FORMAT_MAJOR:
        refuse("DLT-002", at, f"version {shown(version)}; this reader knows {rules.FORMAT_MAJOR}.x")
    missing, unknown = sorted(DELTA_MEMBERS - value.keys()), sorted(value.keys() - DELTA_MEMBERS)
    if missing or (unknown and version == rules.DELTA_VERSION):
        refuse("DLT-003", at, f"members missing: {shown(missing)}, unknown: {shown(unknown)}")


def _check_free(value: dict[str, Any], at: str) -> None:
    if not isinstance(value["tool"], str):
        refuse("DLT-007", at, f"tool must be a string, got {shown(value['tool'])}")
    for member in ("base", "task"):
        if not isinstance(value[member], dict):
            refuse("DLT-007", at, f"{member} must be an object, got {shown(value[member])}")
    check_extensions(value["extensions"], at)
