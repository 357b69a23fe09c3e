"""The pipe: a checkpoint goes in, a sketch comes out, and a report says what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from sketchconv.job import DEFAULT_SHARD_BYTES, Job, prepare
from sketchconv.recipe import Recipe
from sketchconv.report import Report
from sketchconv.worker import Progress, Worker

__all__ = ["Progress", "ProgressCallback", "convert", "run"]

ProgressCallback = Callable[[Progress], None]


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
    progress: ProgressCallback | None = None,
) -> Report:
    """Compress a checkpoint into a sketch; the calibration-free recipe.

    Args:
        src: Hugging Face folder, hub id (``org/name``) or ``.gguf`` file.
        out: a path that ends in ``.sktch`` (one self-contained file), or a folder to make.
        recipe: what to compress and how; 4 bits, one group per row, embeddings copied by default.
        revision: branch, tag or commit on the Hub.
        threads: solver threads; all cores by default. The bytes do not depend on it.
        max_memory: limit on the process's anonymous memory in bytes.
        max_shard_size: bytes of tensor data per file of a folder.
        force: replace an existing sketch.
        progress: called after each chunk, from the calling thread.

    Returns:
        What was done, what it cost and what it saved.

    Raises:
        SketchconvError: one clear line; no output is left behind.
    """
    job = prepare(
        src,
        out,
        recipe or Recipe(),
        revision=revision,
        max_memory=max_memory,
        max_shard_size=max_shard_size,
        force=force,
    )
    return run(job, threads=threads, progress=progress)


def run(
    job: Job, *, threads: int | None = None, progress: ProgressCallback | None = None
) -> Report:
    """Carry out a prepared job, and close its source."""
    started = time.perf_counter()
    try:
        with job.writer() as writer:
            work = Worker(job, writer, threads)
            for event in work.events():
                if progress is not None:
                    progress(event)
            work.commit()
    finally:
        job.source.close()
    return work.report(time.perf_counter() - started)
