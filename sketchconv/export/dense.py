"""Dense export: a sketch, a GGUF file or a checkpoint as a plain Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from sketchconv.document import with_dtype
from sketchconv.errors import RecipeError, SourceError
from sketchconv.export.folder import FolderJob, check_folder, dense_piece, run_folder, warm_up
from sketchconv.export.report import ExportReport
from sketchconv.formats.dense_folder import dense_layouts, with_index
from sketchconv.formats.tensors import TensorInfo
from sketchconv.job import DEFAULT_SHARD_BYTES
from sketchconv.kernels.threads import available_threads
from sketchconv.memory import chunk_budget
from sketchconv.sources.base import FLOATS, Source
from sketchconv.sources.checkpoint_view import SketchCheckpoint
from sketchconv.sources.config import dump_json
from sketchconv.sources.open import open_source
from sketchconv.worker import Progress

DTYPES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def prepare_dense(
    src: str | Path | Source,
    out: str | Path,
    dtype: str | None = None,
    *,
    revision: str | None = None,
    max_memory: int | None = None,
    max_shard_size: int = DEFAULT_SHARD_BYTES,
    threads: int | None = None,
) -> FolderJob:
    """Open the source and decide everything that can be decided from metadata.

    Args:
        src: a `.sktch` file, a sketch folder, a Hugging Face folder, a hub id or a `.gguf` file; or
            a source that is open, which is closed with the job.
        out: the folder to make; nothing that is there is ever replaced.
        dtype: F32, F16 or BF16 for all floating-point tensors. By default each has the dtype that
            it had in the model: the one of the dense weight for a sketch, as stored elsewhere.
        revision: branch, tag or commit on the Hub.
        max_memory: limit on the process's anonymous memory in bytes.
        max_shard_size: bytes of tensor data per file.
        threads: that decode and encode; all cores by default.

    Raises:
        SketchconvError: source and output do not fit together; nothing has been written.
    """
    if src == "" or not str(out):
        raise SourceError("the source and the output must not be empty")
    if dtype is not None and dtype.upper() not in DTYPES:
        raise RecipeError(f"type {dtype!r}: a dense folder holds F32, F16 or BF16")
    wanted = None if dtype is None else dtype.upper()
    output = Path(out)
    if isinstance(src, str | Path):
        src = open_source(str(src), revision=revision, sketches=True)
    source = src
    try:
        check_folder(output, source, "a dense model")
        infos = tuple(_info(source, info, wanted) for info in source.infos.values())
        layouts = dense_layouts(infos, max_shard_size)
        files = with_index(
            {**source.files(), "config.json": _config(source, wanted, infos)}, layouts
        )
        warm_up(source)
        budget = chunk_budget(max_memory)
    except BaseException:
        source.close()
        raise
    return FolderJob(
        source,
        output,
        infos,
        layouts,
        files,
        partial(dense_piece, source),
        _types(infos),
        (),
        budget,
        threads or available_threads(),
    )


def export_dense(
    src: str | Path,
    out: str | Path,
    dtype: str | None = None,
    *,
    revision: str | None = None,
    max_memory: int | None = None,
    max_shard_size: int = DEFAULT_SHARD_BYTES,
    threads: int | None = None,
    resume: bool = True,
    progress: Callable[[Progress], None] | None = None,
) -> ExportReport:
    """Decode a model into a folder: `prepare_dense`, then `run_folder`; see there."""
    job = prepare_dense(
        src,
        out,
        dtype,
        revision=revision,
        max_memory=max_memory,
        max_shard_size=max_shard_size,
        threads=threads,
    )
    return run_folder(job, resume=resume, progress=progress)


def _types(infos: tuple[TensorInfo, ...]) -> dict[str, int]:
    types: dict[str, int] = {}
    for info in infos:
        types[info.dtype] = types.get(info.dtype, 0) + info.count
    return types


def _info(source: Source, info: TensorInfo, wanted: str | None) -> TensorInfo:
    """The tensor as it is written."""
    if info.dtype not in FLOATS:
        return info
    own = info.dtype
    if isinstance(source, SketchCheckpoint):
        own = source.source_dtype(info.name)
    dtype = wanted or (own if own in DTYPES else "F32")
    return TensorInfo(info.name, dtype, info.shape)


def _config(source: Source, wanted: str | None, infos: tuple[TensorInfo, ...]) -> bytes:
    config = dict(source.config())
    if wanted is None and source.format == "gguf":
        # Such a config is made up, and its dtype with it: that of most values is the true one.
        counts = {name: sum(i.count for i in infos if i.dtype == name) for name in DTYPES}
        wanted = max(counts, key=counts.__getitem__)
    if wanted is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = DTYPES[wanted]
    return dump_json(with_dtype(config, source))
