"""Carry out an export: rows through the encoders into the file; and what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sketchconv.export.fingerprints import gguf_fingerprint
from sketchconv.export.importance import Vector, is_weighted, measure_importance, summary
from sketchconv.export.job import GgufJob, check_outputs, prepare_gguf
from sketchconv.export.recall import drop_strays, recall
from sketchconv.export.recipe import ExportRecipe
from sketchconv.export.report import ExportReport
from sketchconv.export.rows import tasks
from sketchconv.export.tasks import write_tasks
from sketchconv.formats.gguf_writer import GgufWriter
from sketchconv.journal import Journal
from sketchconv.keeping import keeping
from sketchconv.memory import anonymous_bytes
from sketchconv.noted import Noted
from sketchconv.worker import Progress

if TYPE_CHECKING:
    from sketchconv.calibration.options import Calibration

_ORIGINS: Final = ("the source has", "the source, or what a text says of its columns, has")


def export_gguf(
    src: str | Path,
    out: str | Path,
    recipe: ExportRecipe | None = None,
    *,
    revision: str | None = None,
    max_memory: int | None = None,
    max_shard_size: int | None = None,
    threads: int | None = None,
    force: bool = False,
    calibration: Calibration | None = None,
    resume: bool = True,
    progress: Callable[[Progress], None] | None = None,
) -> ExportReport:
    """Write a model as GGUF: `prepare_gguf`, then `run`; see there for arguments and errors."""
    job = prepare_gguf(
        src,
        out,
        recipe,
        revision=revision,
        max_memory=max_memory,
        max_shard_size=max_shard_size,
        threads=threads,
        force=force,
        calibration=calibration,
    )
    return run(job, resume=resume, progress=progress)


def run(
    job: GgufJob,
    *,
    resume: bool = True,
    progress: Callable[[Progress], None] | None = None,
) -> ExportReport:
    """Carry out a prepared export, and close its source.

    Args:
        job: see `prepare_gguf`.
        resume: go on with what an interrupted run of the same export left; otherwise drop it.
        progress: called after each piece, from the calling thread.

    Raises:
        SketchconvError: one clear line; there is no output. Where that is not about a weight's own
            values, finished tensors are kept beside it, and the next run goes on there. A
            `ResumeError` if that was another export.
        Suspended: interrupted, and finished tensors were kept.
    """
    started, peak = time.perf_counter(), 0
    try:
        journal = Journal(job.output, gguf_fingerprint(job), resume=resume)
        if journal.resumes:
            recall(job, journal)
        else:
            drop_strays(job.output, job.layouts)
        # Once more: parts that a killed run put in place are no obstacle, what is left of them is.
        folder = job.output.absolute().parent
        check_outputs(folder, job.layouts, job.reader.paths, force=job.overwrite)
        total = len(job.plan.steps)
        with keeping(journal, total, lambda resumes: job.writer(resume=resumes)) as writer:
            # The disk has been reserved by now: a text may take hours to be read.
            importance = _importance(job, progress)
            noted = Noted(journal, writer, job.output, _ORIGINS[job.calibration is not None])
            for event in _events(job, writer, noted, importance):
                peak = max(peak, anonymous_bytes())
                if progress is not None:
                    progress(event)
            writer.commit()
    finally:
        job.reader.close()
    parent = job.output.parent
    notes = summary(job.plan.steps, importance) if job.calibration else ()
    return ExportReport(
        job.source,
        tuple((str(parent / name), size) for name, size in job.sizes.items()),
        job.plan.parameters,
        job.plan.types(),
        (*job.plan.notes, *notes),
        job.source_bytes,
        time.perf_counter() - started,
        peak,
    )


def _importance(job: GgufJob, progress: Callable[[Progress], None] | None) -> Mapping[str, Vector]:
    """Measure which columns matter, where that was asked for."""
    if job.calibration is None:
        return {}

    def tick(text: str, done: int, total: int) -> None:
        if progress is not None:
            progress(Progress(text, "measure", done, total))

    steps = [step for step in job.plan.steps if is_weighted(step)]
    with job.reader.model(steps) as (source, names):
        return measure_importance(
            source,
            names,
            job.calibration,
            folder=job.output.absolute().parent,
            max_memory=job.max_memory,
            threads=job.threads,
            tick=tick,
        )


def _events(
    job: GgufJob, writer: GgufWriter, noted: Noted, importance: Mapping[str, Vector]
) -> Iterator[Progress]:
    total, done = job.plan.parameters, 0
    yield Progress("reading", "read", 0, total)
    wanted = tasks(job.reader, job.plan.steps, job.budget, job.threads, importance)
    for name, values in write_tasks(wanted, writer, noted, job.threads, job.budget):
        done += values
        yield Progress(name, "encode", done, total)
