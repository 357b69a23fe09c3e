"""The worker: carries a job's chunks through the solver into the writer."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

from sketchconv.chunks import Chunk, SourceDigest, read_ahead, row_chunks
from sketchconv.finite import check_finite, without_infinity
from sketchconv.formats.draft import Results
from sketchconv.formats.manifest import SketchRecord
from sketchconv.job import Job
from sketchconv.memory import anonymous_bytes
from sketchconv.noted import Noted, stored_names
from sketchconv.plan import Step
from sketchconv.report import Costs, Report, TensorResult, make_report, result_of, stored_parameters
from sketchconv.sketching import (
    SketchedRows,
    compile_solver,
    finished_rows,
    fitted_rows,
    method_rows,
    ready_rows,
)
from sketchconv.sources.base import FLOATS, ReadySource
from sketchconv.sources.matrices import Matrices

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from sketchconv.calibration.factors import Factors
    from sketchconv.calibration.methods import Method
    from sketchconv.calibration.report import CalibrationReport
    from sketchconv.calibration.state import FinishedWeights
    from sketchconv.journal import Entry
    from sketchconv.noted import Known, TensorWriter


@dataclass(frozen=True, slots=True)
class Progress:
    """One event: what is at work, and the values passed through so far (0 before the first)."""

    name: str
    action: str
    done: int
    total: int


@dataclass
class _Tally:
    """Sums over the chunks of one weight; exactly rounded, so chunking cannot change them."""

    squared_error: list[float] = field(default_factory=list)
    squared_norm: list[float] = field(default_factory=list)

    def sums(self) -> tuple[float, float]:
        """Squared error and squared norm."""
        return math.fsum(self.squared_error), math.fsum(self.squared_norm)


class Worker:
    """The state of one running job: sums, digests, times."""

    def __init__(
        self,
        job: Job,
        writer: TensorWriter,
        threads: int | None,
        finished: FinishedWeights | None = None,
        journal: Known | None = None,
    ) -> None:
        self.job = job
        self.source = Matrices(job.source, job.plan.forms)
        self.writer = writer
        self.threads = threads
        self.digest = SourceDigest()
        self.results: list[TensorResult] = []
        self.solve_seconds = 0.0
        self.compile_seconds = 0.0
        self.peak = anonymous_bytes()
        self._finished = finished
        self._noted = Noted(journal, writer, job.output)
        self._entry: Entry | None = None
        self._method = _plain_method(job)
        self._ready = job.source if isinstance(job.source, ReadySource) else None
        self._tally = _Tally()
        self._column_weights: npt.NDArray[np.float64] | None = None
        self._factors: Factors | None = None

    def events(self) -> Iterator[Progress]:
        """Do all the work; an event before and after compiling, then one per chunk."""
        steps = ordered_steps(self.job)
        total, done = stored_parameters(steps), 0
        yield Progress("preparing kernels (compiled once per machine)", "compile", 0, total)
        if not self.job.plan.ready:
            self.compile_seconds = compile_solver(self.job.recipe)
        yield Progress("reading", "read", 0, total)
        chunks = chain.from_iterable(row_chunks(step, self.job.budget) for step in steps)
        for chunk in self.work(chunks):
            done += chunk.weights
            yield Progress(chunk.step.name, chunk.step.action, done, total)

    def work(self, chunks: Iterable[Chunk | None]) -> Iterator[Chunk]:
        """Carry out chunks, those of a tensor in order; each is given back when it is done.

        Args:
            chunks: see `read_ahead` for None.
        """
        for chunk, raw in read_ahead(chunks, self._fetch):
            if chunk.begin == 0:
                self._entry = self._noted.take(chunk.step.name, stored_names(chunk.step))
            if self._entry is not None:
                self._skip(chunk, raw)
            elif chunk.step.action == "sketch":
                self._sketch(chunk, raw)
            else:
                self._copy(chunk, raw)
            if chunk.last:
                self._finish(chunk.step)
            self.peak = max(self.peak, anonymous_bytes())
            yield chunk

    def outcome(self) -> Results:
        """What the writer needs to commit, once all is done."""
        errors = {result.name: result.relative_error for result in self.results}
        return Results(errors=errors, source_digest=self.digest.hexdigest(self.job.plan.steps))

    def report(self, seconds: float, calibration: CalibrationReport | None = None) -> Report:
        """What was done, for a job that took `seconds` in all."""
        peak = max(self.peak, calibration.peak_anonymous if calibration else 0)
        costs = Costs(seconds, self.solve_seconds, self.compile_seconds, peak)
        return make_report(self.job, self.results, costs, calibration)

    def _fetch(self, chunk: Chunk) -> bytes:
        raw = self.source.rows(chunk.step.name, chunk.begin, chunk.end)
        self.digest.update(chunk.step.name, raw)
        return raw

    def _float32(self, name: str, raw: bytes) -> npt.NDArray[np.float32]:
        """Values of raw rows, writable: Numba would compile everything again for read-only ones."""
        import numpy as np

        return np.require(self.source.float32(name, raw), requirements=["C", "W"])

    def _skip(self, chunk: Chunk, raw: bytes) -> None:
        """A chunk of a step that is done: what comes later may need to have seen it."""
        name, moments = chunk.step.name, self.job.moments
        sketched = chunk.step.action == "sketch"
        if sketched and chunk.begin == 0:
            moments.column_weights(name)
        if moments.needs(name):
            rows = self._float32(name, raw)
            moments.observe(name, chunk.begin, rows, self.threads, matrix=sketched)

    def _copy(self, chunk: Chunk, raw: bytes) -> None:
        moments, name = self.job.moments, chunk.step.name
        if chunk.step.info.dtype in FLOATS:
            rows = self._float32(name, raw)
            # Buffers such as attention masks may hold infinities; parameters may not.
            is_parameter = name.endswith((".weight", ".bias"))
            check_finite(chunk, rows if is_parameter else without_infinity(rows), self.threads)
            if moments.needs(name):
                moments.observe(name, chunk.begin, rows, self.threads)
        self.writer.append(name, self.source.stored(name, raw))

    def _sketch(self, chunk: Chunk, raw: bytes) -> None:
        record, name, moments = chunk.step.record, chunk.step.name, self.job.moments
        if record is None:
            raise TypeError(f"{name}: a sketch step without a record")
        if chunk.begin == 0:
            self._tally = _Tally()
        if self._ready is not None and chunk.step.ready:
            self._append(chunk, record, ready_rows(*self._ready.ready(name, raw)))
            return
        if chunk.begin == 0:
            self._column_weights = moments.column_weights(name)
            self._factors = moments.factors(name)
        rows = self._float32(name, raw)
        check_finite(chunk, rows, self.threads)
        started = time.perf_counter()
        if self._finished is not None and record in self._finished:
            solved = finished_rows(self._finished, record, chunk, rows)
        else:
            solved = self._fit(chunk, record, rows)
        self.solve_seconds += time.perf_counter() - started
        if moments.needs(name):
            moments.observe(name, chunk.begin, rows, self.threads, matrix=True)
        self._append(chunk, record, solved)

    def _append(self, chunk: Chunk, record: SketchRecord, solved: SketchedRows) -> None:
        self.writer.append(record.index_name, solved.packed)
        self.writer.append(record.lut_name, solved.lut)
        self._tally.squared_error += solved.squared_error.tolist()
        self._tally.squared_norm += solved.squared_norm.tolist()

    def _finish(self, step: Step) -> None:
        source, sketched = self.digest.of(step.name), step.action == "sketch"
        if self._entry is not None:
            self._noted.check(self._entry, source)
            squares = self._entry.squares
        else:
            squares = self._tally.sums() if sketched else (0.0, 0.0)
            self._noted.add(step.name, stored_names(step), source, squares)
        if sketched:
            self.results.append(result_of(step, *squares))

    def _fit(
        self, chunk: Chunk, record: SketchRecord, rows: npt.NDArray[np.float32]
    ) -> SketchedRows:
        if self._method is not None:
            return method_rows(record, rows, self._method, threads=self.threads)
        if self._factors is not None:
            from sketchconv.calibration.methods import WITHOUT_DATA

            given = self._factors, self._column_weights
            return method_rows(record, rows, WITHOUT_DATA, *given, threads=self.threads)
        if record.shaped:
            from sketchconv.shaping import shaped_rows

            return shaped_rows(chunk, record, rows, self._column_weights, threads=self.threads)
        weights, exact = self._column_weights, self.job.recipe.exact
        return fitted_rows(chunk, record, rows, weights, exact=exact, threads=self.threads)


def _plain_method(job: Job) -> Method | None:
    """The named method that fits weights without data, if the job asks for one."""
    if job.calibration is None:
        return None
    from sketchconv.calibration.methods import method_named, needs_statistics

    method = method_named(job.calibration.method)
    return None if needs_statistics(method) else method


def ordered_steps(job: Job) -> list[Step]:
    """Steps that read weights: in the order in which the moments need them, then the rest."""
    steps = {s.name: s for s in job.plan.steps if s.action in ("sketch", "copy")}
    first = [name for name in job.moments.order if name in steps]
    return [steps[name] for name in dict.fromkeys((*first, *steps))]
