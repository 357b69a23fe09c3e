"""Carry out an export: rows through the encoders into the file; and what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sketchconv.export.importance import Vector, is_weighted, measure_importance, summary
from sketchconv.export.job import GgufJob, prepare_gguf
from sketchconv.export.recipe import ExportRecipe
from sketchconv.export.report import ExportReport
from sketchconv.export.rows import encoded
from sketchconv.formats.gguf_writer import GgufWriter
from sketchconv.memory import anonymous_bytes
from sketchconv.worker import Progress

if TYPE_CHECKING:
    from sketchconv.calibration.options import Calibration


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
    return run(job, progress=progress)


def run(job: GgufJob, *, progress: Callable[[Progress], None] | None = None) -> ExportReport:
    """Carry out a prepared export, and close its source.

    Raises:
        SketchconvError: one clear line; no output is left behind.
    """
    started, peak = time.perf_counter(), 0
    try:
        importance = _importance(job, progress)
        with job.writer() as writer:
            for event in _events(job, writer, importance):
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
    job: GgufJob, writer: GgufWriter, importance: Mapping[str, Vector]
) -> Iterator[Progress]:
    total, done = job.plan.parameters, 0
    yield Progress("reading", "read", 0, total)
    for piece in encoded(job.reader, job.plan.steps, job.budget, job.threads, importance):
        writer.append(piece.step.name, piece.data)
        done += piece.values
        yield Progress(piece.step.name, "encode", done, total)
