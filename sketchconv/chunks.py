"""Row chunks: how tensors larger than the memory budget pass through the pipeline."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from sketchconv.plan import Step

SPAN = 128  # rows; chunks are whole spans, as a solver's matrix products are (`calibration.spans`)
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows ``[begin, end)`` of one step's tensor; `last` marks its final chunk."""

    step: Step
    begin: int
    end: int
    last: bool

    @property
    def weights(self) -> int:
        """Number of values in the chunk."""
        rows = self.step.info.shape[0] if self.step.info.shape else 1
        return self.step.parameters * (self.end - self.begin) // rows


def row_memory(step: Step) -> int:
    """Working memory of one row, with two raw rows: one in work and one read ahead."""
    rows = step.info.shape[0] if step.info.shape else 1
    raw = -(-step.info.nbytes // rows)
    columns = -(-step.parameters // rows)
    if step.record is None:
        return 2 * raw + raw + 4 * columns
    # float32 values, indices, packed indices, LUT with its float64 scratch
    lut = 16 * step.record.groups * (1 << step.record.bits)
    return 2 * raw + 4 * columns + columns + columns + lut


def row_chunks(step: Step, budget: int) -> Iterator[Chunk]:
    """Cut a step's tensor into chunks of whole rows that each fit `budget` bytes."""
    rows = step.info.shape[0] if step.info.shape else 1
    size = max(1, budget // row_memory(step))
    if size > SPAN:
        size -= size % SPAN
    for begin in range(0, rows, size):
        end = min(begin + size, rows)
        yield Chunk(step, begin, end, last=end == rows)


def read_ahead(items: Iterable[T | None], fetch: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    """Yield ``(item, fetch(item))`` in order; the next fetch runs while the caller works.

    An exception of `fetch` is raised at its item. At most two results are alive. A None among the
    items stands for "nothing more for now": what was fetched is then yielded at once.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="sketchconv-read") as pool:
        pending = None
        for item in items:
            following = None if item is None else (item, pool.submit(fetch, item))
            if pending is not None:
                yield pending[0], pending[1].result()
            pending = following
        if pending is not None:
            yield pending[0], pending[1].result()


class SourceDigest:
    """One SHA-256 over everything that was read: it names the source by content."""

    def __init__(self) -> None:
        self._open: dict[str, hashlib._Hash] = {}

    def update(self, name: str, raw: bytes) -> None:
        """Add the next bytes of one tensor; a tensor's chunks come in order."""
        self._open.setdefault(name, hashlib.sha256()).update(raw)

    def of(self, name: str) -> str:
        """The digest of what was read of one tensor."""
        return self._open[name].hexdigest()

    def hexdigest(self, steps: Iterable[Step]) -> str:
        """Digest over name, dtype, shape and content of every tensor read, by name."""
        return total_digest(steps, {name: run.hexdigest() for name, run in self._open.items()})


def total_digest(steps: Iterable[Step], digests: Mapping[str, str]) -> str:
    """Digest over name, dtype, shape and content of tensors, by name.

    Args:
        steps: what is known of them.
        digests: SHA-256 of the content of those that count, hexadecimal, by name.
    """
    total = hashlib.sha256()
    for step in sorted(steps, key=lambda s: s.name):
        if step.name in digests:
            shape = ",".join(map(str, step.info.shape))
            line = f"{step.name}\0{step.info.dtype}\0{shape}\0"
            total.update(line.encode() + bytes.fromhex(digests[step.name]))
    return total.hexdigest()
