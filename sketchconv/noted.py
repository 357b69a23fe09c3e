"""What a job takes from the journal of an interrupted run, and what it notes there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sketchconv.errors import ResumeError

if TYPE_CHECKING:
    from sketchconv.formats.part import Data
    from sketchconv.journal import Entry
    from sketchconv.plan import Step

_SOURCE = "the source has"


class Store(Protocol):
    """A writer that knows the digests of its stored tensors."""

    keep: bool

    def adopt(self, digests: Mapping[str, str]) -> bool:
        """Take stored tensors that a former run has written, if they have these digests."""

    def digest(self, name: str) -> str:
        """The digest of what a stored tensor holds so far."""


class TensorWriter(Store, Protocol):
    """A writer of stored tensors."""

    def append(self, name: str, data: Data) -> None:
        """Write the next bytes of a stored tensor."""


class Known(Protocol):
    """A journal, or what stands for it in another process."""

    finished: dict[str, Entry]

    def add(self, entry: Entry) -> None:
        """Note a finished tensor."""


class Noted:
    """The finished tensors of one job.

    Args:
        journal: where they are noted; None notes nothing.
        writer: has them.
        output: that is being made, for messages.
        origin: what their digests are of, and "has", for messages.
    """

    def __init__(
        self, journal: Known | None, writer: Store, output: Path, origin: str = _SOURCE
    ) -> None:
        self._journal, self._writer = journal, writer
        self._output, self._origin = output, origin

    @property
    def silent(self) -> bool:
        """Whether nothing is noted, so that no digests are needed."""
        return self._journal is None

    def take(self, name: str, stored: Collection[str]) -> Entry | None:
        """What a former run noted of a tensor, if the writer has what it stored of it.

        Args:
            name: in the source.
            stored: names of the stored tensors that it gives.
        """
        known = None if self._journal is None else self._journal.finished.get(name)
        if known is None or set(known.stored) != set(stored):
            return None
        return known if self._writer.adopt(known.stored) else None

    def check(self, entry: Entry, source: str) -> None:
        """Compare what was taken with what it came from.

        Args:
            entry: from `take`.
            source: SHA-256 of its tensor in the source, as it is now.

        Raises:
            ResumeError: it was another one.
        """
        if source != entry.source:
            raise ResumeError(
                f"{entry.name}: {self._origin} other values than when the conversion to "
                f"{self._output} was interrupted; pass --no-resume to start anew"
            )

    def add(
        self,
        name: str,
        stored: Collection[str],
        source: str,
        squares: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """Note a tensor that this run has done; the writer's temporary is then worth keeping.

        Raises:
            OutputError: the disk is full or fails.
        """
        if self._journal is None:
            return
        from sketchconv.journal import Entry

        digests = {name: self._writer.digest(name) for name in stored}
        self._journal.add(Entry(name, source, digests, squares))
        self._writer.keep = True


def stored_names(step: Step) -> tuple[str, ...]:
    """The stored tensors that a step of a conversion writes."""
    record = step.record
    return (step.name,) if record is None else (record.index_name, record.lut_name)
