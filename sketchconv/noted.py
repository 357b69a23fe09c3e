"""What a worker takes from the journal of an interrupted run, and what it notes there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sketchconv.errors import ResumeError

if TYPE_CHECKING:
    from sketchconv.chunks import Chunk
    from sketchconv.formats.writer import BundleWriter, FolderWriter
    from sketchconv.journal import Entry, Journal
    from sketchconv.plan import Step


class Noted:
    """The finished steps of one job.

    Args:
        journal: where they are noted; None notes nothing.
        writer: has their tensors.
        output: that is being made, for messages.
    """

    def __init__(
        self, journal: Journal | None, writer: BundleWriter | FolderWriter, output: Path
    ) -> None:
        self._journal = journal
        self._writer = writer
        self._output = output
        self._entry: Entry | None = None

    def takes(self, chunk: Chunk) -> bool:
        """Whether a former run wrote the chunk's step, and its tensors are there as it did.

        To be asked for every chunk, in order.
        """
        if chunk.begin == 0:
            known = None if self._journal is None else self._journal.finished.get(chunk.step.name)
            named = known is not None and set(known.stored) == set(_stored(chunk.step))
            whole = known is not None and named and self._writer.adopt(known.stored)
            self._entry = known if whole else None
        return self._entry is not None

    def squares(self, source: str) -> tuple[float, float]:
        """Squared error and norm of the step that was taken.

        Args:
            source: SHA-256 of its tensor in the source, as it is now.

        Raises:
            ResumeError: it was another one.
        """
        if self._entry is None:
            raise TypeError("no step was taken")
        if source != self._entry.source:
            raise ResumeError(
                f"{self._entry.name}: the source has other values than when the conversion to "
                f"{self._output} was interrupted; pass --no-resume to start anew"
            )
        return self._entry.squares

    def add(self, step: Step, source: str, squares: tuple[float, float]) -> None:
        """Note a step that this run has done; the writer's temporary is then worth keeping."""
        if self._journal is None:
            return
        from sketchconv.journal import Entry

        stored = {name: self._writer.digest(name) for name in _stored(step)}
        self._journal.add(Entry(step.name, source, stored, squares))
        self._writer.keep = True


def _stored(step: Step) -> tuple[str, ...]:
    """The stored tensors that a step writes."""
    record = step.record
    return (step.name,) if record is None else (record.index_name, record.lut_name)
