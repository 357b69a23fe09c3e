"""Carry out an export: rows through the encoders into the file; and what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sketchconv.export.job import GgufJob, prepare_gguf
from sketchconv.export.recipe import ExportRecipe
from sketchconv.export.report import ExportReport
from sketchconv.export.rows import encoded
from sketchconv.formats.gguf_writer import GgufWriter
from sketchconv.memory import anonymous_bytes
from sketchconv.worker import Progress


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
    )
    return run(job, progress=progress)


def run(job: GgufJob, *, progress: Callable[[Progress], None] | None = None) -> ExportReport:
    """Carry out a prepared export, and close its source.

    Raises:
        SketchconvError: one clear line; no output is left behind.
    """
    started, peak = time.perf_counter(), 0
    try:
        with job.writer() as writer:
            for event in _events(job, writer):
                peak = max(peak, anonymous_bytes())
                if progress is not None:
                    progress(event)
            writer.commit()
    finally:
        job.reader.close()
    parent = job.output.parent
    return ExportReport(
        job.source,
        tuple((str(parent / name), size) for name, size in job.sizes.items()),
        job.plan.parameters,
        job.plan.types(),
        job.plan.notes,
        job.source_bytes,
        time.perf_counter() - started,
        peak,
    )


def _events(job: GgufJob, writer: GgufWriter) -> Iterator[Progress]:
    total, done = job.plan.parameters, 0
    yield Progress("reading", "read", 0, total)
    for piece in encoded(job.reader, job.plan.steps, job.budget, job.threads):
        writer.append(piece.step.name, piece.data)
        done += piece.values
        yield Progress(piece.step.name, "encode", done, total)
