"""The pass ahead of a shared conversion: column weights need the tensors in the network's order.

One thread reads what the moments must have seen, once more than the conversion itself does, and
hands out each tensor as soon as its weights are known. It stays only a few tensors ahead, so that
what it has read still lies in the system's cache when another process reads it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from queue import Empty, Full, Queue
from threading import Event, Thread

import numpy as np

from sketchconv.chunks import row_chunks
from sketchconv.job import Job
from sketchconv.journal import Entry
from sketchconv.parallel.messages import Task
from sketchconv.plan import Step
from sketchconv.sources.base import FLOATS
from sketchconv.sources.matrices import Matrices

_SECONDS = 0.1


class Scout:
    """A thread that makes tasks of steps, in their order.

    Args:
        job: whose moments they are.
        steps: in the order in which the moments need them.
        finished: what former runs noted.
        budget: bytes that a chunk may take.
        ahead: tasks that may wait.
    """

    def __init__(
        self,
        job: Job,
        steps: Sequence[Step],
        finished: dict[str, Entry],
        budget: int,
        ahead: int,
    ) -> None:
        self._job, self._steps, self._budget = job, steps, budget
        self._finished = dict(finished)
        self._source = Matrices(job.source, job.plan.forms)
        self._waiting: Queue[Task] = Queue(ahead)
        self._stop, self._done = Event(), Event()
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, name="sketchconv-scout", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Tasks that can be had at once."""
        return self._waiting.qsize()

    @property
    def exhausted(self) -> bool:
        """Whether no more tasks come."""
        return self._done.is_set() and self._error is None and not self.waiting

    def next(self) -> Task | None:
        """A task, or None if none is known yet. Raises what the thread has met."""
        done = self._done.is_set()
        try:
            return self._waiting.get_nowait()
        except Empty:
            if done and self._error is not None:
                raise self._error from None
            return None

    def end(self) -> None:
        """Stop, and wait until no more is read. May be called again."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            # A weight that is no number is refused by name where it is converted.
            with np.errstate(all="ignore"):
                for step in self._steps:
                    if self._stop.is_set():
                        return
                    self._take(step)
        except BaseException as error:  # `next` raises it
            self._error = error
        finally:
            self._done.set()

    def _take(self, step: Step) -> None:
        sketched = step.action == "sketch"
        weights = self._job.moments.column_weights(step.name) if sketched else None
        self._put(Task(step.name, weights, self._finished.get(step.name)))
        if self._job.moments.needs(step.name) and (sketched or step.info.dtype in FLOATS):
            for chunk in row_chunks(step, self._budget):
                if self._stop.is_set():
                    return
                self._observe(step.name, chunk.begin, chunk.end, matrix=sketched)

    def _observe(self, name: str, begin: int, end: int, *, matrix: bool) -> None:
        raw = self._source.rows(name, begin, end)
        rows = np.require(self._source.float32(name, raw), requirements=["C", "W"])
        self._job.moments.observe(name, begin, rows, 1, matrix=matrix)

    def _put(self, task: Task) -> None:
        while not self._stop.is_set():
            try:
                self._waiting.put(task, timeout=_SECONDS)
            except Full:
                continue
            return


def load_kernels() -> None:
    """Have what moments compute with compiled, or read from its cache: it takes memory."""
    from sketchconv.kernels.cpu import (
        accumulate_column_squares,
        accumulate_column_sums,
        bf16_to_f32,
        matvec,
        squared_matvec,
    )

    rows, vector = np.ones((1, 256), np.float32), np.ones(256)
    bf16_to_f32(np.ones(256, np.uint16))
    accumulate_column_sums(rows, np.zeros(256))
    accumulate_column_squares(rows, np.zeros(256))
    matvec(rows, vector)
    squared_matvec(rows, vector)
