"""Analyse a fine-tune: spectra of its updates, and sketches of the base as `convert` makes them."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sketchconv.calibration.threads import torch_threads
from sketchconv.formats.sketches import SketchRecord
from sketchconv.formats.tensors import TensorInfo
from sketchconv.job import Job, prepare
from sketchconv.memory import DEFAULT_CHUNK_BYTES
from sketchconv.projection.analysis import Analysis, Comparison, LayerAnalysis, compare, ranks_of
from sketchconv.projection.layers import check_free, sketch_rows, spans
from sketchconv.projection.matched import Matched
from sketchconv.projection.updates import Judge, Left, Planned, ProgressCallback, Update, left_of
from sketchconv.recipe import Recipe, SketchSpec
from sketchconv.sources.open import open_source
from sketchconv.sources.sketch import SketchSource
from sketchconv.worker import Worker

GROUPS = (1, 2, 4, 8)
BITS = 4


def analyze(
    base: str | Path,
    tuned: str | Path,
    *,
    bits: int = BITS,
    groups: Sequence[int] = GROUPS,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> Analysis:
    """Compare updates of low rank with updates of a sketch, weight by weight.

    One matrix is in memory at a time. The base is compressed once for each number of groups, and
    no sketch is written.

    Args:
        base: the dense base: a Hugging Face folder, a hub id or a `.gguf` file.
        tuned: its fine-tune, of the same kinds.
        bits: of the sketches.
        groups: of the sketches, one for each comparison.
        threads: of torch and of the solver; all cores by default.
        progress: called after each weight.

    Raises:
        SketchconvError: the models do not belong together, or rows cannot be cut so.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sketchconv-")))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch_threads(threads))
        jobs = []
        for count in groups:  # each is checked before the work begins
            recipe = Recipe(SketchSpec(bits=bits, groups=count))
            jobs.append(prepare(base, folder / "never.sktch", recipe))
            stack.callback(jobs[-1].source.close)
        plan = Planned(jobs[0])
        found = open_source(str(tuned))
        stack.callback(found.close)
        update = Update(Matched(found, plan, "TUNED"), plan.rows)
        names = dict.fromkeys(r.name for job in jobs for r in job.plan.sketches)
        spectra = update.spectra({n: plan.shape(n) for n in names}, progress)
        errors = {f"G = {n}": _sketched(job, update, threads, progress)
                  for n, job in zip(groups, jobs, strict=True)}  # fmt: skip
        layers = tuple(_layer(name, plan.shape(name), spectra[name], errors) for name in names)
        dense = _uncompared(plan.infos, names)
        return Analysis(plan.id, found.id, "tuned - dense base", layers, dense)


def analyze_sketch(
    base: str | Path,
    tuned: str | Path,
    dense_base: str | Path | None = None,
    *,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> Analysis:
    """The same on the index maps of a sketch.

    Args:
        base: the sketch, a `.sktch` file or a folder.
        tuned: the fine-tune.
        dense_base: the dense model that the base was made from. Without it the update is
            ``tuned - decoded base``, which holds the base's own error too.
        threads: of torch; all cores by default.
        progress: called after each weight.

    Raises:
        SketchconvError: the models do not belong together.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch_threads(threads))
        sketch = stack.enter_context(SketchSource(Path(base)))
        check_free(sketch)

        def opened(spec: str | Path, role: str) -> Matched:
            source = open_source(str(spec))
            stack.callback(source.close)
            return Matched(source, sketch, role)

        matched = opened(tuned, "TUNED")
        start = "tuned - decoded base sketch"
        dense: Callable[[str, int, int], Any] = _decoded(sketch)
        if dense_base is not None:
            start, dense = "tuned - dense base", opened(dense_base, "the dense base").rows
        update = Update(matched, dense)
        records = sketch.records
        spectra = update.spectra({n: r.shape for n, r in records.items()}, progress)
        left = {name: _own_maps(sketch, record, update) for name, record in records.items()}
        layers = tuple(
            _layer(name, record.shape, spectra[name], {"its own maps": left})
            for name, record in records.items()
        )
        dense_names = _uncompared(sketch.infos, records)
        return Analysis(sketch.id, matched.source.id, start, layers, dense_names)


def _sketched(
    job: Job, update: Update, threads: int | None, progress: ProgressCallback | None
) -> dict[str, Left]:
    judge = Judge(job.plan.sketches, update)
    writer: Any = judge  # nothing is kept, so nothing is asked of it but to take what comes
    for event in Worker(job, writer, threads).events():
        if progress is not None:
            progress(event)
    return judge.left


def _own_maps(base: SketchSource, record: SketchRecord, update: Update) -> Left:
    parts = [
        left_of(sketch_rows(base, record, b, e).codes, update.rows(record.name, b, e))
        for b, e in spans(record, DEFAULT_CHUNK_BYTES)
    ]
    return Left(record, math.fsum(parts))


def _decoded(base: SketchSource) -> Callable[[str, int, int], Any]:
    return lambda name, begin, end: base.float32(name, base.rows(name, begin, end))


def _layer(
    name: str,
    shape: tuple[int, int],
    found: tuple[Tensor, float],
    errors: Mapping[str, Mapping[str, Left]],
) -> LayerAnalysis:
    energies, dense = found
    total = float(energies.sum())
    comparisons: dict[str, Comparison] = {}
    if total > 0:
        for label, left in errors.items():
            if name in left:
                record = left[name].record
                comparisons[label] = compare(
                    shape, record.bits, record.groups, energies, left[name].energy
                )
    relative = math.sqrt(total / dense) if dense > 0 else None
    return LayerAnalysis(name, shape, total, relative, ranks_of(energies), comparisons)


def _uncompared(infos: Mapping[str, TensorInfo], names: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(n for n, info in infos.items() if len(info.shape) == 2 and n not in names)
