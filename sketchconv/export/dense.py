"""Dense export: a sketch, a GGUF file or a checkpoint as a plain Hugging Face folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np

from sketchconv.document import with_dtype
from sketchconv.errors import OutputError, RecipeError, SourceError, WeightError
from sketchconv.export.encoders import ENCODERS
from sketchconv.export.job import check_outputs
from sketchconv.export.pool import in_order
from sketchconv.export.report import ExportReport
from sketchconv.export.rows import BYTES_PER_VALUE, PIECE, check_finite
from sketchconv.formats.dense_folder import DenseFolderWriter, dense_layouts, with_index
from sketchconv.formats.laid_file import FileLayout
from sketchconv.formats.tensors import TensorInfo
from sketchconv.job import DEFAULT_SHARD_BYTES
from sketchconv.kernels.threads import available_threads
from sketchconv.memory import anonymous_bytes, chunk_budget
from sketchconv.sources.base import FLOATS, Source
from sketchconv.sources.checkpoint_view import SketchCheckpoint
from sketchconv.sources.config import dump_json
from sketchconv.sources.open import open_source
from sketchconv.worker import Progress

DTYPES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_OTHER_FORMATS: Final = (".sktch", ".gguf", ".safetensors", ".bin", ".pt", ".pth", ".onnx")


@dataclass(frozen=True, slots=True)
class DenseJob:
    """A dense export that has been checked from metadata and can start.

    Attributes:
        source: where the weights come from; `run_dense` closes it.
        output: the folder to make.
        infos: every tensor of the output.
        layouts: of the weight files by name.
        files: the small files by path.
        budget: bytes of working memory for all chunks of rows together.
        threads: that decode and encode.
    """

    source: Source
    output: Path
    infos: tuple[TensorInfo, ...]
    layouts: Mapping[str, FileLayout]
    files: Mapping[str, bytes]
    budget: int
    threads: int

    @property
    def sizes(self) -> dict[str, int]:
        """Exact bytes of every file."""
        small = {name: len(data) for name, data in self.files.items()}
        return {**{name: x.size for name, x in self.layouts.items()}, **small}

    @property
    def output_bytes(self) -> int:
        """Exact bytes on disk of the finished output."""
        return sum(self.sizes.values())

    @property
    def parameters(self) -> int:
        """Values in all tensors."""
        return sum(info.count for info in self.infos)


def prepare_dense(
    src: str | Path | Source,
    out: str | Path,
    dtype: str | None = None,
    *,
    revision: str | None = None,
    max_memory: int | None = None,
    max_shard_size: int = DEFAULT_SHARD_BYTES,
    threads: int | None = None,
) -> DenseJob:
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
        _check_output(output, source)
        infos = tuple(_info(source, info, wanted) for info in source.infos.values())
        layouts = dense_layouts(infos, max_shard_size)
        files = with_index(
            {**source.files(), "config.json": _config(source, wanted, infos)}, layouts
        )
        _warm_up(source)
        budget = chunk_budget(max_memory)
    except BaseException:
        source.close()
        raise
    return DenseJob(source, output, infos, layouts, files, budget, threads or available_threads())


def export_dense(
    src: str | Path,
    out: str | Path,
    dtype: str | None = None,
    *,
    revision: str | None = None,
    max_memory: int | None = None,
    max_shard_size: int = DEFAULT_SHARD_BYTES,
    threads: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> ExportReport:
    """Decode a model into a folder: `prepare_dense`, then `run_dense`; see there."""
    job = prepare_dense(
        src,
        out,
        dtype,
        revision=revision,
        max_memory=max_memory,
        max_shard_size=max_shard_size,
        threads=threads,
    )
    return run_dense(job, progress=progress)


def run_dense(job: DenseJob, *, progress: Callable[[Progress], None] | None = None) -> ExportReport:
    """Carry out a prepared dense export, and close its source.

    Raises:
        SketchconvError: one clear line; no output is left behind.
    """
    started, peak = time.perf_counter(), 0
    try:
        with DenseFolderWriter(job.output, job.layouts, job.files) as writer:
            for event in _events(job, writer):
                peak = max(peak, anonymous_bytes())
                if progress is not None:
                    progress(event)
            writer.commit()
    finally:
        job.source.close()
    types: dict[str, int] = {}
    for info in job.infos:
        types[info.dtype] = types.get(info.dtype, 0) + info.count
    return ExportReport(
        job.source.id,
        tuple((str(job.output / name), size) for name, size in job.sizes.items()),
        job.parameters,
        types,
        (),
        job.source.nbytes,
        time.perf_counter() - started,
        peak,
    )


def _warm_up(source: Source) -> None:
    """Load what decoding needs, so that a memory limit counts it as used."""
    floats = (i for i in source.infos.values() if i.dtype in FLOATS and 0 not in i.shape)
    for info in islice(floats, 1):
        source.float32(info.name, source.rows(info.name, 0, 1))


def _check_output(output: Path, source: Source) -> None:
    if output.suffix.lower() in _OTHER_FORMATS:
        raise OutputError(f"{output}: a dense model is a folder; name one without that suffix")
    check_outputs(output.absolute().parent, {output.name: None}, source.paths, force=True)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise OutputError(f"{output}: exists already; a dense model replaces nothing, remove it")


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


def _events(job: DenseJob, writer: DenseFolderWriter) -> Iterator[Progress]:
    total, done = job.parameters, 0
    yield Progress("reading", "read", 0, total)
    share = job.budget // (job.threads + 1)
    spans = ((info, *span) for info in job.infos for span in _spans(info, share))
    encode = partial(_encoded, job.source)
    for (info, begin, end), data in in_order(spans, lambda s: encode(*s), job.threads):
        writer.append(info.name, data)
        done += info.count * (end - begin) // max(1, info.shape[0] if info.shape else 1)
        yield Progress(info.name, "encode", done, total)


def _spans(info: TensorInfo, budget: int) -> Iterator[tuple[int, int]]:
    rows = info.shape[0] if info.shape else 1
    columns = max(1, info.count // max(1, rows))
    size = max(1, min(budget // BYTES_PER_VALUE, PIECE) // columns)
    return ((begin, min(begin + size, rows)) for begin in range(0, rows, size))


def _encoded(source: Source, info: TensorInfo, begin: int, end: int) -> bytes:
    """Rows in the dtype of the output; parameters must be finite, buffers may be anything."""
    raw = source.rows(info.name, begin, end)
    if info.dtype not in FLOATS:
        return source.stored(info.name, raw)
    rows = np.require(source.float32(info.name, raw), requirements=["C"])
    flat = rows.reshape(len(rows), -1) if rows.ndim > 1 else rows.reshape(1, -1)
    if info.name.endswith((".weight", ".bias")):
        check_finite(info.name, flat, begin)
    if source.infos[info.name].dtype == info.dtype:
        return source.stored(info.name, raw)
    try:
        data: bytes = ENCODERS[info.dtype].encode(flat).tobytes()
    except WeightError as error:
        raise WeightError(f"{info.name}: {error}") from None
    return data
