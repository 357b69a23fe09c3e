"""Which deltas a sketch has had applied: the extension `sktch.deltas` of its document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from sketchconv.errors import DeltaError
from sketchconv.formats.document import is_digest
from sketchconv.formats.strict_json import Fixed

EXTENSION: Final = "sktch.deltas"
_ENTRY: Final = {"delta", "errors", "name"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One applied delta.

    Args:
        delta: its seal.
        name: of its task, if it has one.
        errors: the error metric of each weight that it changed, as it was before.
    """

    delta: str
    name: str | None
    errors: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Applied:
    """All deltas that were applied to a sketch, in order.

    Args:
        entries: the deltas.
        headers: header lengths of files of the base that were not padded as Writers do, so that
            reverting gives those bytes back too.
    """

    entries: tuple[Entry, ...] = ()
    headers: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, extensions: Mapping[str, Any], where: str) -> Applied:
        """Read the extension of a document; without it nothing was applied.

        Raises:
            DeltaError: it is not what `spec/delta.md` says.
        """
        value = extensions.get(EXTENSION, {"applied": [], "headers": {}})
        try:
            entries = tuple(_entry(entry) for entry in value["applied"])
            headers = {str(k): int(n) for k, n in value["headers"].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            text = f"{where}: the extension {EXTENSION} is malformed; it cannot be reverted"
            raise DeltaError(text) from error
        return cls(entries, headers)

    def into(self, extensions: Mapping[str, Any]) -> dict[str, Any]:
        """A document's extensions with this one; without it when nothing is applied."""
        others = {k: v for k, v in extensions.items() if k != EXTENSION}
        if not self.entries:
            return others
        applied = [
            {
                "delta": e.delta,
                "errors": {k: _fixed(v) for k, v in e.errors.items()},
                "name": e.name,
            }
            for e in self.entries
        ]
        return {**others, EXTENSION: {"applied": applied, "headers": dict(self.headers)}}

    def position(self, seal: str) -> int | None:
        """Where a delta stands among those applied; the last such, None if it is none of them."""
        found = [i for i, entry in enumerate(self.entries) if entry.delta == seal]
        return found[-1] if found else None


def _entry(value: Any) -> Entry:
    if value.keys() != _ENTRY or not is_digest(value["delta"]):
        raise ValueError(value)
    errors = dict(value["errors"].items())
    if not all(error is None or isinstance(error, float) for error in errors.values()):
        raise ValueError(value)
    name = value["name"]
    return Entry(value["delta"], None if name is None else str(name), errors)


def _fixed(error: float | None) -> Fixed | None:
    return None if error is None else Fixed.of(error)
