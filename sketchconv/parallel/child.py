"""What a process of a shared conversion does: convert the tensors that it is given."""

from __future__ import annotations

import os
import pickle
import signal
import traceback
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from queue import Empty, Queue
from threading import Thread

import numpy as np
import numpy.typing as npt

from sketchconv.chunks import Chunk, row_chunks
from sketchconv.errors import ResumeError, SketchconvError
from sketchconv.formats.draft import Draft
from sketchconv.formats.shared import SharedWriter
from sketchconv.job import Job
from sketchconv.journal import Entry, infos_digest
from sketchconv.memory import anonymous_bytes, give_back_at_once, watched_peak
from sketchconv.moments import EqualWeights
from sketchconv.parallel.messages import Advanced, Failed, Finished, Ready, Share, Task
from sketchconv.sketching import compile_solver
from sketchconv.sources.base import Source
from sketchconv.sources.open import open_source
from sketchconv.worker import Worker

Vector = npt.NDArray[np.float64]
# Seconds to wait for another tensor to read ahead, before what was read is worked on.
_PATIENCE = 0.005


@dataclass(frozen=True, slots=True)
class _Given(EqualWeights):
    """Column weights as they came with the tasks."""

    description: str = "given"
    weights: dict[str, Vector | None] = field(default_factory=dict)

    def column_weights(self, name: str) -> Vector | None:
        """Those of a tensor, which are asked for once."""
        return self.weights.pop(name, None)


class _Entries:
    """What former runs noted of the tensors at work, and then what this one has to note."""

    def __init__(self) -> None:
        self.finished: dict[str, Entry] = {}

    def add(self, entry: Entry) -> None:
        """Keep it for the report."""
        self.finished[entry.name] = entry


def serve(descriptor: int) -> None:
    """Take part in the conversion of the process at the other end of a pipe, until it says enough.

    When that process is gone, this one ends at once.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other one decides
    with Connection(descriptor) as parent:
        try:
            share = parent.recv()
        except EOFError:
            return
        orders: Queue[int | Task | None] = Queue()
        Thread(target=_listen, args=(parent, orders), daemon=True).start()
        try:
            _take_part(share, parent, orders)
        except BaseException as error:  # raised there
            parent.send(Failed(_portable(error), traceback.format_exc()))


def _listen(parent: Connection, orders: Queue[int | Task | None]) -> None:
    order: int | Task | None = 0
    while order is not None:
        try:
            order = parent.recv()
        except (EOFError, OSError):
            os._exit(1)
        orders.put(order)


def _take_part(share: Share, parent: Connection, orders: Queue[int | Task | None]) -> None:
    with watched_peak() as peak, closing(_opened(share)) as source:
        if share.limited:
            give_back_at_once()
        seconds = _load(share)
        parent.send(Ready(anonymous_bytes(), seconds))
        budget = orders.get()
        if not isinstance(budget, int):
            return
        given, entries = _Given(), _Entries()
        job = _job(share, source, given, budget)
        writer = SharedWriter(share.shared.files)
        worker = Worker(job, writer, share.threads, journal=entries)
        for chunk in worker.work(_chunks(job, orders, given, entries)):
            step = chunk.step
            parent.send(Advanced(step.name, step.action, chunk.weights))
            if chunk.last:
                done = entries.finished.pop(step.name)
                parent.send(Finished(done, peak(), worker.solve_seconds))


def _load(share: Share) -> float:
    """Load all that the work needs, before its memory is counted; returns seconds."""
    if share.calibration is not None:
        import sketchconv.calibration.solve  # noqa: F401 (torch and much else)
    return 0.0 if share.plan.ready else compile_solver(share.recipe)


def _opened(share: Share) -> Source:
    source = open_source(str(share.place), imports=share.imports)
    source.id = share.source
    if infos_digest(source.infos) != share.infos:
        source.close()
        raise ResumeError(f"{source.id}: the source was changed while it was being converted")
    return source


def _job(share: Share, source: Source, given: _Given, budget: int) -> Job:
    """What a worker needs of the job; nothing that only opens or commits the output."""
    return Job(
        source,
        share.output,
        share.recipe,
        share.plan,
        given,
        Draft(),
        {},
        {},
        budget,
        0,
        False,
        share.calibration,
    )


def _chunks(
    job: Job, orders: Queue[int | Task | None], given: _Given, entries: _Entries
) -> Iterator[Chunk | None]:
    """The chunks of all tensors that come; None where there is none to read ahead."""
    steps = {step.name: step for step in job.plan.steps}
    while True:
        try:
            task = orders.get(timeout=_PATIENCE)
        except Empty:
            yield None
            task = orders.get()
        if not isinstance(task, Task):
            return
        given.weights[task.name] = task.weights
        if task.entry is not None:
            entries.add(task.entry)
        yield from row_chunks(steps[task.name], job.budget)


def _portable(error: BaseException) -> BaseException:
    """An error that survives the way to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does
        text = f"{type(error).__name__}: {error}"
        return SketchconvError(text) if isinstance(error, SketchconvError) else RuntimeError(text)
    return error
