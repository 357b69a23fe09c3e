"""Several processes that convert one checkpoint, and the one that keeps their books.

The output is laid out and reserved before the work, so each process writes its tensors at their
places. This one opens and commits the output, hands out tensors one by one, and alone writes the
journal: whatever ends a conversion, what is kept is what one process would have kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from multiprocessing.connection import wait
from types import TracebackType
from typing import TYPE_CHECKING

from sketchconv.chunks import total_digest
from sketchconv.errors import OutputError, ProcessError
from sketchconv.formats.draft import Results
from sketchconv.job import Job
from sketchconv.journal import Entry, Journal
from sketchconv.memory import anonymous_bytes, watched_peak
from sketchconv.parallel.helper import Gone, Helper
from sketchconv.parallel.messages import Advanced, Failed, Finished, Ready, Task
from sketchconv.parallel.room import Room
from sketchconv.parallel.scout import Scout, load_kernels
from sketchconv.parallel.shares import shares_of
from sketchconv.report import Costs, Report, TensorResult, make_report, result_of, stored_parameters
from sketchconv.worker import Progress, ordered_steps

if TYPE_CHECKING:
    from sketchconv.formats.writer import BundleWriter, FolderWriter

_POLL_SECONDS = 0.02


class Crew:
    """The processes of one job, from its start to its end.

    Args:
        job: with `jobs` processes.
        writer: of its output.
        journal: of its finished tensors.
        threads: of all processes together; None: every core.
    """

    def __init__(
        self,
        job: Job,
        writer: BundleWriter | FolderWriter,
        journal: Journal,
        threads: int | None,
    ) -> None:
        self._job, self._writer, self._journal = job, writer, journal
        self._steps = ordered_steps(job)
        first = set(job.moments.order)
        free = [step for step in self._steps if step.name not in first]
        free.sort(key=lambda step: (step.action != "sketch", -step.parameters))
        known = journal.finished
        self._free = deque(Task(step.name, None, known.get(step.name)) for step in free)
        self._scouted = [step for step in self._steps if step.name in first]
        self._shares = shares_of(job, writer.shared(), min(job.jobs, len(self._steps)), threads)
        self._helpers: list[Helper] = []
        self._scout: Scout | None = None
        self._entries: dict[str, Entry] = {}
        self._compile_seconds, self._peak = 0.0, 0
        self._stack = ExitStack()

    def __enter__(self) -> Crew:
        self._seen = self._stack.enter_context(watched_peak())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()
        self._stack.close()

    def events(self) -> Iterator[Progress]:
        """Do all the work; an event before and after the processes start, then one per chunk."""
        total, done = stored_parameters(self._steps), 0
        yield Progress("preparing kernels (compiled once per machine)", "compile", 0, total)
        self._start()
        yield Progress("reading", "read", 0, total)
        while len(self._entries) < len(self._steps):
            self._feed()
            for helper in self._talking():
                chunk = self._hear(helper)
                if chunk is not None:
                    done += chunk.values
                    yield Progress(chunk.name, chunk.action, done, total)
        for helper in self._helpers:
            helper.dismiss()
            helper.wait()
        self._peak = self._seen() + sum(helper.peak for helper in self._helpers)

    def outcome(self) -> Results:
        """What the writer needs to commit."""
        digests = {name: entry.source for name, entry in self._entries.items()}
        errors = {result.name: result.relative_error for result in self._results()}
        return Results(errors, total_digest(self._job.plan.steps, digests))

    def report(self, seconds: float) -> Report:
        """What was done, for a job that took `seconds` in all."""
        solving = sum(helper.solve_seconds for helper in self._helpers)
        costs = Costs(seconds, solving, self._compile_seconds, self._peak, len(self._helpers))
        return make_report(self._job, self._results(), costs)

    def _results(self) -> list[TensorResult]:
        sketched = [step for step in self._steps if step.action == "sketch"]
        return [result_of(step, *self._entries[step.name].squares) for step in sketched]

    def _start(self) -> None:
        """Start one process alone, which may have to compile; the others then find it done."""
        self._add(1)
        ready = self._ready(self._helpers[0])
        self._compile_seconds = ready.compile_seconds
        if self._scouted:
            load_kernels()
        room = Room(anonymous_bytes(), ready.used, self._job.moments.nbytes if self._scouted else 0)
        budget = room.chunk_budget(self._job.max_memory, len(self._shares))
        if self._scouted:
            ahead = 4 * len(self._shares)
            known = self._journal.finished
            self._scout = Scout(self._job, self._scouted, known, budget, ahead)
            self._scout.start()
        self._add(len(self._shares))
        for helper in self._helpers:
            helper.tell(budget)

    def _add(self, count: int) -> None:
        """Start processes until there are so many."""
        begin = len(self._helpers)
        for share in self._shares[begin:count]:
            self._helpers.append(Helper(share))
        for helper in self._helpers[begin:]:
            helper.begin()

    def _ready(self, helper: Helper) -> Ready:
        try:
            report = helper.heard()
        except Gone:
            raise self._ended(helper) from None
        if isinstance(report, Failed):
            raise _raised(report)
        if not isinstance(report, Ready):
            raise TypeError(f"a process began with {type(report).__name__}")
        helper.ready, helper.peak = True, report.used
        return report

    def _feed(self) -> None:
        """Hand out tensors: one to whoever has none, and one to read ahead while enough wait."""
        for helper in self._helpers:
            while helper.ready and not helper.dismissed:
                if len(helper.tasks) > (self._waiting > len(self._helpers)):
                    break
                task = self._next()
                if task is None:
                    break
                helper.tell(task)
        if self._exhausted:
            for helper in self._helpers:
                helper.dismiss()

    def _next(self) -> Task | None:
        if self._free:
            return self._free.popleft()
        return None if self._scout is None else self._scout.next()

    @property
    def _waiting(self) -> int:
        return len(self._free) + (self._scout.waiting if self._scout else 0)

    @property
    def _exhausted(self) -> bool:
        return not self._free and (self._scout is None or self._scout.exhausted)

    def _talking(self) -> list[Helper]:
        """Helpers that have something to say; waits for one, or for a tensor to hand out."""
        by = {h.connection: h for h in self._helpers if h.tasks or not h.dismissed}
        idle = any(helper.ready and not helper.tasks for helper in by.values())
        return [by[c] for c in wait(list(by), _POLL_SECONDS if idle else None)]  # type: ignore[index]

    def _hear(self, helper: Helper) -> Advanced | None:
        """Take a report; a chunk of a tensor is given back."""
        try:
            report = helper.heard()
        except Gone:
            raise self._ended(helper) from None
        if isinstance(report, Advanced):
            return report
        if isinstance(report, Failed):
            raise _raised(report)
        if isinstance(report, Ready):
            helper.ready, helper.peak = True, report.used
        else:
            helper.tasks.popleft()
            helper.peak, helper.solve_seconds = report.peak, report.solve_seconds
            self._note(report.entry)
        return None

    def _note(self, entry: Entry) -> None:
        """A tensor is done: the output has it, and the journal, unless it had it already."""
        self._entries[entry.name] = entry
        if self._journal.finished.get(entry.name) != entry:
            self._journal.add(entry)
            self._writer.keep = True
        self._writer.settle(entry.stored)

    def _ended(self, helper: Helper) -> ProcessError:
        """What to raise for a process that has ended by itself."""
        self._end()
        name = helper.tasks[0].name if helper.tasks else str(self._job.output)
        kept = f"; {self._journal.kept(len(self._steps))}" if self._writer.keep else ""
        return ProcessError(
            f"{name}: the process that was at work on it {helper.how_it_ended()}; fewer --jobs or "
            f"a lower --max-memory take less memory{kept}"
        )

    def _end(self) -> None:
        """End everything that runs; what was finished by then is noted. May be called again."""
        if self._scout is not None:
            self._scout.end()
        for helper in self._helpers:
            for report in helper.end():
                if isinstance(report, Finished):
                    with suppress(OutputError):
                        self._note(report.entry)


def _raised(report: Failed) -> BaseException:
    """An error of another process, with the place where it was raised there as its cause."""
    report.error.__cause__ = RuntimeError(f"in a process of --jobs:\n{report.trace}")
    return report.error
