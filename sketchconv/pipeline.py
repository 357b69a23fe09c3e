"""The pipe: a checkpoint goes in, a sketch comes out, and a report says what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sketchconv.job import DEFAULT_SHARD_BYTES, Job, prepare
from sketchconv.journal import Journal, fingerprint_of
from sketchconv.keeping import keeping
from sketchconv.parallel.checks import check_threads
from sketchconv.recipe import Recipe
from sketchconv.report import Report
from sketchconv.worker import Progress, Worker

if TYPE_CHECKING:
    from sketchconv.calibration.options import Calibration
    from sketchconv.formats.draft import Results
    from sketchconv.formats.writer import BundleWriter, FolderWriter
    from sketchconv.importers.base import ImportOptions

__all__ = ["Progress", "ProgressCallback", "convert", "run", "write"]

ProgressCallback = Callable[[Progress], None]


class Committer(Protocol):
    """A writer, as far as its end is concerned."""

    def commit(self, results: Results) -> None:
        """Put the output in place."""


class Work(Protocol):
    """The work of a job, by one process or several."""

    def events(self) -> Iterator[Progress]:
        """Do all of it."""
        ...

    def outcome(self) -> Results:
        """What the writer needs to commit."""
        ...

    def report(self, seconds: float) -> Report:
        """What was done, for a job that took `seconds` in all."""
        ...


def convert(
    src: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    revision: str | None = None,
    threads: int | None = None,
    max_memory: int | None = None,
    max_shard_size: int = DEFAULT_SHARD_BYTES,
    force: bool = False,
    calibration: Calibration | None = None,
    resume: bool = True,
    imports: ImportOptions | None = None,
    jobs: int = 1,
    progress: ProgressCallback | None = None,
) -> Report:
    """Compress a checkpoint into a sketch; without a calibration, no data is needed.

    Args:
        src: Hugging Face folder, hub id (``org/name``) or ``.gguf`` file.
        out: a path that ends in ``.sktch`` (one self-contained file), or a folder to make.
        recipe: what to compress and how; 4 bits, one group per row, embeddings copied by default.
        revision: branch, tag or commit on the Hub.
        threads: solver threads; all cores by default. The bytes do not depend on it.
        max_memory: limit on the anonymous memory in bytes, of all processes together.
        max_shard_size: bytes of tensor data per file of a folder.
        force: replace an existing sketch.
        calibration: fit the weights of the blocks to activations on a text.
        resume: go on with what an interrupted run of the same conversion left; otherwise drop it.
        imports: of a checkpoint that another project quantized (`sketchconv.importers`): its base
            and its precision. Its indices and tables are taken over; nothing is fitted.
        jobs: processes that the tensors are shared among; the bytes do not depend on it. With more
            than one they are started anew (no fork), and this one keeps the journal.
        progress: called after each chunk, from the calling thread.

    Returns:
        What was done, what it cost and what it saved.

    Raises:
        SketchconvError: one clear line; there is no output. Where that is not about a weight's own
            values, finished tensors (of a calibration: blocks) are kept beside it, and the next run
            goes on there. A `ResumeError` if that was another conversion.
        Suspended: interrupted, and finished work was kept.
    """
    job = prepare(
        src,
        out,
        recipe or Recipe(),
        revision=revision,
        max_memory=max_memory,
        max_shard_size=max_shard_size,
        force=force,
        calibration=calibration,
        imports=imports,
        jobs=jobs,
    )
    return run(job, threads=threads, resume=resume, progress=progress)


def run(
    job: Job,
    *,
    threads: int | None = None,
    resume: bool = True,
    progress: ProgressCallback | None = None,
) -> Report:
    """Carry out a prepared job, and close its source. Raises as `convert`."""
    started = time.perf_counter()
    try:
        check_threads(job.jobs, threads)
        if job.calibration is not None and job.calibration.texts:
            from sketchconv.calibrated import run_calibrated

            return run_calibrated(job, started, threads=threads, resume=resume, progress=progress)
        journal = Journal(job.output, fingerprint_of(job), resume=resume)
        total = sum(step.action in ("sketch", "copy") for step in job.plan.steps)
        with (
            keeping(journal, total, lambda resumes: job.writer(resume=resumes)) as writer,
            _workers(job, writer, journal, threads) as work,
        ):
            write(work, writer, progress)
        return work.report(time.perf_counter() - started)
    finally:
        job.source.close()


@contextmanager
def _workers(
    job: Job, writer: BundleWriter | FolderWriter, journal: Journal, threads: int | None
) -> Iterator[Work]:
    """One worker here, or several processes."""
    if job.jobs == 1:
        yield Worker(job, writer, threads, journal=journal)
        return
    from sketchconv.parallel.crew import Crew

    with Crew(job, writer, journal, threads) as crew:
        yield crew


def write(work: Work, writer: Committer, progress: ProgressCallback | None) -> None:
    """Let a worker, or several, do all the work, and commit the output."""
    for event in work.events():
        if progress is not None:
            progress(event)
    writer.commit(work.outcome())
