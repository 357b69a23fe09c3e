"""Tensors of an export: encoded in pieces by several threads, written in order, and noted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from sketchconv.export.pool import in_order

if TYPE_CHECKING:
    from sketchconv.journal import Entry
    from sketchconv.noted import Noted

# Bytes of a source's tensor that are read at a time for its digest.
_READ: Final = 4 << 20
Piece = tuple[str, bytes]
"""A stored tensor, and the next of its bytes."""


@dataclass(frozen=True, slots=True)
class Task:
    """One tensor to write.

    Args:
        name: of the tensor.
        stored: names of the stored tensors that it becomes.
        rows: of the output.
        columns: values of a row.
        step: rows of a piece.
        value_bytes: working memory of a value.
        encode: the pieces that rows [begin, end) become.
        digest: SHA-256 of all that decides these bytes beside the settings of the job.
    """

    name: str
    stored: tuple[str, ...]
    rows: int
    columns: int
    step: int
    value_bytes: int
    encode: Callable[[int, int], Sequence[Piece]]
    digest: Callable[[], str]

    def spans(self) -> Iterator[tuple[int, int]]:
        """The rows of each piece."""
        return ((at, min(at + self.step, self.rows)) for at in range(0, self.rows, self.step))


@dataclass(frozen=True, slots=True)
class _Item:
    """A piece of a task; without rows its digest, to be noted, or compared with an entry's."""

    task: Task
    span: tuple[int, int] | None
    entry: Entry | None = None

    @property
    def memory(self) -> int:
        """Bytes while it is in work."""
        row = self.task.columns * self.task.value_bytes
        return max(2 * _READ, row) if self.span is None else row * (self.span[1] - self.span[0])

    def work(self) -> Sequence[Piece] | str:
        """The pieces, or the digest."""
        return self.task.digest() if self.span is None else self.task.encode(*self.span)


class Sink(Protocol):
    """Where tensors are written."""

    def append(self, name: str, data: bytes) -> None:
        """Write the next bytes of a tensor."""


def write_tasks(
    tasks: Iterable[Task], writer: Sink, noted: Noted, threads: int, budget: int
) -> Iterator[tuple[str, int]]:
    """Write tensors one after the other; those that a former run has written are taken over.

    Args:
        tasks: in the order in which they are written.
        writer: takes their bytes.
        noted: knows and notes what is finished.
        threads: that encode.
        budget: bytes of working memory for all pieces that are in work together.

    Yields:
        The name, and how many values have been passed since the last time.

    Raises:
        WeightError, SourceError: as the tasks do.
        ResumeError: a tensor that was taken over would now become another one.
        OutputError: the disk is full or fails.
    """
    done = in_order(_items(tasks, noted), _Item.work, threads, lambda item: item.memory, budget)
    for item, result in done:
        task = item.task
        if item.span is not None and not isinstance(result, str):
            for name, data in result:
                writer.append(name, data)
            yield task.name, (item.span[1] - item.span[0]) * task.columns
        elif item.entry is not None:
            noted.check(item.entry, str(result))
            yield task.name, task.rows * task.columns
        else:
            noted.add(task.name, task.stored, str(result))


def _items(tasks: Iterable[Task], noted: Noted) -> Iterator[_Item]:
    for task in tasks:
        entry = noted.take(task.name, task.stored)
        if entry is None:
            yield from (_Item(task, span) for span in task.spans())
        if not noted.silent:
            yield _Item(task, None, entry)


def rows_digest(
    read: Callable[[int, int], bytes], rows: int, row_bytes: int, *others: bytes
) -> str:
    """SHA-256 of a tensor's bytes in the source, read in pieces, and of what else counts.

    Args:
        read: the bytes of rows [begin, end).
        rows: how many there are.
        row_bytes: about the bytes of one.
        others: what else decides what becomes of it.
    """
    running, step = hashlib.sha256(), max(1, _READ // max(1, row_bytes))
    for at in range(0, rows, step):
        running.update(read(at, min(at + step, rows)))
    for data in others:
        running.update(data)
    return running.hexdigest()
