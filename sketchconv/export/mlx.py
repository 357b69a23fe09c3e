"""MLX export: a sketch as a folder that mlx-lm loads, with the same weights to the last bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sketchconv.architecture import ModelMap, open_skeleton
from sketchconv.errors import ArchitectureError, PlanError, SourceError
from sketchconv.export.folder import (
    FolderJob,
    Piece,
    check_folder,
    dense_piece,
    run_folder,
    warm_up,
)
from sketchconv.export.mlx_config import mlx_config
from sketchconv.export.mlx_plan import MlxWeight, common_settings, exact_weights, inexact_reason
from sketchconv.export.report import ExportReport
from sketchconv.formats.dense_folder import dense_layouts, with_index
from sketchconv.formats.tensors import TensorInfo
from sketchconv.job import DEFAULT_SHARD_BYTES
from sketchconv.kernels.threads import available_threads
from sketchconv.memory import chunk_budget
from sketchconv.sources.checkpoint_view import SketchCheckpoint
from sketchconv.sources.config import dump_json
from sketchconv.sources.open import open_source
from sketchconv.worker import Progress

_HEAD = "lm_head.weight"
_WAY = "make the sketch with --grid affine or --grid symmetric, or export it with --dense"


@dataclass(frozen=True, slots=True)
class _Encoder:
    """Rows of the model as pieces of the output."""

    source: SketchCheckpoint
    weights: Mapping[str, MlxWeight]

    def __call__(self, info: TensorInfo, begin: int, end: int) -> Sequence[Piece]:
        weight = self.weights.get(info.name)
        if weight is None:
            return dense_piece(self.source, info, begin, end)
        return weight.pieces(self.source.rows(info.name, begin, end))


def prepare_mlx(
    src: str | Path,
    out: str | Path,
    *,
    revision: str | None = None,
    max_memory: int | None = None,
    max_shard_size: int = DEFAULT_SHARD_BYTES,
    threads: int | None = None,
) -> FolderJob:
    """Open a sketch and decide how MLX holds each of its weights; reads the tables.

    A weight that MLX's affine mode cannot give to the last bit is stored dense, in the dtype of its
    LUTs, and the notes say so.

    Args:
        src: a `.sktch` file, a sketch folder, or a hub id of one.
        out: the folder to make; nothing that is there is ever replaced.
        revision: branch, tag or commit on the Hub.
        max_memory: limit on the process's anonymous memory in bytes.
        max_shard_size: bytes of tensor data per file.
        threads: that encode; all cores by default. The bytes do not depend on it.

    Raises:
        PlanError: MLX would hold most of the sketched linear weights dense.
        ArchitectureError: mlx-lm's model of that type is not known to compute the same.
        SketchconvError: source and output do not fit together; nothing has been written.
    """
    if str(src) == "" or not str(out):
        raise SourceError("the source and the output must not be empty")
    source = open_source(str(src), revision=revision, sketches=True)
    if not isinstance(source, SketchCheckpoint):
        source.close()
        raise SourceError(f"{src}: not a sketch, and MLX models are made of sketches; {_WAY}")
    try:
        return _planned(source, Path(out), max_memory, max_shard_size, threads)
    except BaseException:
        source.close()
        raise


def export_mlx(
    src: str | Path,
    out: str | Path,
    *,
    revision: str | None = None,
    max_memory: int | None = None,
    max_shard_size: int = DEFAULT_SHARD_BYTES,
    threads: int | None = None,
    resume: bool = True,
    progress: Callable[[Progress], None] | None = None,
) -> ExportReport:
    """Write a sketch for mlx-lm: `prepare_mlx`, then `run_folder`; see there."""
    job = prepare_mlx(
        src,
        out,
        revision=revision,
        max_memory=max_memory,
        max_shard_size=max_shard_size,
        threads=threads,
    )
    return run_folder(job, resume=resume, progress=progress)


def _planned(
    source: SketchCheckpoint,
    output: Path,
    max_memory: int | None,
    max_shard_size: int,
    threads: int | None,
) -> FolderJob:
    check_folder(output, source, "an MLX model")
    skeleton, model = open_skeleton(source.config(), source.infos)
    raw, tied = source.config(), _HEAD not in source.infos
    _check_ties(source)
    config, notes = mlx_config(raw, skeleton.config, tied=tied)
    weights = exact_weights(source)
    _check_exact(source, model, weights)
    settings = common_settings(weights)
    # Written twice, as mlx-lm does: itself it reads the first, the Hub shows the second.
    config = {**config, "quantization": settings, "quantization_config": settings}
    infos = tuple(source.infos.values())
    stored = [p for i in infos for p in (weights[i.name].infos if i.name in weights else (i,))]
    layouts = dense_layouts(stored, max_shard_size, "mlx")
    files = with_index({**source.files(), "config.json": dump_json(config)}, layouts)
    warm_up(source)
    return FolderJob(
        source,
        output,
        infos,
        layouts,
        files,
        _Encoder(source, weights),
        _types(infos, weights),
        (*notes, *_dense_note(source, weights)),
        chunk_budget(max_memory),
        threads or available_threads(),
        {name: tuple(info.name for info in weight.infos) for name, weight in weights.items()},
    )


def _check_ties(source: SketchCheckpoint) -> None:
    others = [name for name in source.aliases if name != _HEAD]
    if others:
        raise ArchitectureError(
            f"{others[0]}: shares its weights with {source.aliases[others[0]]}, which mlx-lm does"
            " only for the head; export the sketch with --dense"
        )


def _check_exact(
    source: SketchCheckpoint, model: ModelMap, weights: Mapping[str, MlxWeight]
) -> None:
    """Refuse a sketch that would mostly be dense: that is another export.

    Raises:
        PlanError: names the first weight that has no exact form.
    """
    records = [r for name, r in source.records.items() if name in model.linears]
    missed = [r for r in records if r.name not in weights]
    lost = sum(r.shape[0] * r.shape[1] for r in missed)
    if not weights or 2 * lost > sum(r.shape[0] * r.shape[1] for r in records):
        first = (missed or list(source.records.values()))[0]
        raise PlanError(
            f"{first.name}: {inexact_reason(first)} ({len(missed)} of {len(records)} linear weights"
            f" have no exact form in MLX's affine mode); {_WAY}"
        )


def _dense_note(source: SketchCheckpoint, weights: Mapping[str, MlxWeight]) -> list[str]:
    missed = [r for name, r in source.records.items() if name not in weights]
    if not missed:
        return []
    more = f" and {len(missed) - 1} more" if len(missed) > 1 else ""
    size = sum(source.infos[r.name].nbytes for r in missed)
    return [
        f"stored dense, in {size:,} bytes, since MLX's affine mode cannot hold them to the last"
        f" bit: {missed[0].name}{more} ({inexact_reason(missed[0])})"
    ]


def _types(infos: Sequence[TensorInfo], weights: Mapping[str, MlxWeight]) -> dict[str, int]:
    types: Counter[str] = Counter()
    for info in infos:
        weight = weights.get(info.name)
        types[info.dtype if weight is None else weight.described] += info.count
    return dict(types)
