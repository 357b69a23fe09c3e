"""A delta merged into its base, for other tools: exact, and without a file in between."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sketchconv.projection.difference import overlaid
from sketchconv.worker import Progress

if TYPE_CHECKING:
    from sketchconv.export.recipe import ExportRecipe
    from sketchconv.export.report import ExportReport

ProgressCallback = Callable[[Progress], None]


def export_safetensors(
    delta: str | Path,
    base: str | Path,
    out: str | Path,
    dtype: str | None = None,
    *,
    max_memory: int | None = None,
    threads: int | None = None,
    resume: bool = True,
    progress: ProgressCallback | None = None,
) -> ExportReport:
    """Write the tuned model as a plain Hugging Face folder, bit-exact, without a file in between.

    Args:
        delta, base: paths of both.
        out: the folder to make.
        dtype: F32, F16 or BF16 for all tensors; None: as in the dense model.
        max_memory: limit on the process's anonymous memory in bytes.
        threads: that decode; all cores by default.
        resume: go on with what an interrupted run of the same export left; otherwise drop it.
        progress: called after each chunk.

    Raises:
        DeltaError: the delta was not made for this base.
        SketchconvError: as `export.dense.prepare_dense` and `export.folder.run_folder`.
    """
    from sketchconv.export.dense import prepare_dense
    from sketchconv.export.folder import run_folder

    with overlaid(Path(delta), Path(base)) as source:
        job = prepare_dense(source, out, dtype, max_memory=max_memory, threads=threads)
        return run_folder(job, resume=resume, progress=progress)


def export_gguf(
    delta: str | Path,
    base: str | Path,
    out: str | Path,
    recipe: ExportRecipe | None = None,
    *,
    max_memory: int | None = None,
    threads: int | None = None,
    force: bool = False,
    resume: bool = True,
    progress: ProgressCallback | None = None,
) -> ExportReport:
    """Write the tuned model as GGUF, exact unless the recipe asks for a type.

    Args:
        delta, base: paths of both.
        out: a path that ends in `.gguf`.
        recipe, max_memory, threads, force: as `export.job.prepare_gguf` takes them.
        resume: go on with what an interrupted run of the same export left; otherwise drop it.
        progress: called after each chunk.

    Raises:
        DeltaError: the delta was not made for this base.
        SketchconvError: as `prepare_gguf` and `export.run.run`.
    """
    from sketchconv.export.job import prepare_gguf
    from sketchconv.export.run import run

    with overlaid(Path(delta), Path(base)) as source:
        job = prepare_gguf(source, out, recipe, max_memory=max_memory, threads=threads, force=force)
        return run(job, resume=resume, progress=progress)
