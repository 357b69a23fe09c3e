"""An export to a folder of safetensors: decided from metadata, then carried out piece by piece."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np

from sketchconv.errors import OutputError, WeightError
from sketchconv.export.encoders import ENCODERS
from sketchconv.export.fingerprints import folder_fingerprint
from sketchconv.export.job import check_outputs
from sketchconv.export.report import ExportReport
from sketchconv.export.rows import PIECE, check_finite
from sketchconv.export.tasks import Piece, Task, rows_digest, write_tasks
from sketchconv.formats.dense_folder import DenseFolderWriter
from sketchconv.formats.laid_file import FileLayout
from sketchconv.formats.tensors import TensorInfo
from sketchconv.journal import Journal
from sketchconv.keeping import keeping
from sketchconv.memory import anonymous_bytes
from sketchconv.noted import Noted
from sketchconv.sources.base import FLOATS, Source
from sketchconv.sources.values import row_count
from sketchconv.worker import Progress

_OTHER_FORMATS: Final = (".sktch", ".gguf", ".safetensors", ".bin", ".pt", ".pth", ".onnx")
# Working copies of a value: as it is stored, float32 twice, a mask, codes, the result.
_VALUE_BYTES: Final = 32
__all__ = ["FolderJob", "Piece", "check_folder", "dense_piece", "run_folder", "warm_up"]


@dataclass(frozen=True, slots=True)
class FolderJob:
    """An export to a folder that has been checked and can start.

    Attributes:
        source: where the weights come from; `run_folder` closes it.
        output: the folder to make.
        infos: the tensors that are read, as they are in the model.
        layouts: of the weight files by name.
        files: the small files by path.
        encode: the pieces of the output that rows [begin, end) of a tensor become.
        types: values by the type that they are stored in.
        notes: hints for the user.
        budget: bytes of working memory for all chunks of rows together.
        threads: that decode and encode.
        parts: names of the stored tensors that a tensor becomes, where it is not stored by its own.
    """

    source: Source
    output: Path
    infos: tuple[TensorInfo, ...]
    layouts: Mapping[str, FileLayout]
    files: Mapping[str, bytes]
    encode: Callable[[TensorInfo, int, int], Sequence[Piece]]
    types: Mapping[str, int]
    notes: tuple[str, ...]
    budget: int
    threads: int
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

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

    def writer(self, resume: bool = False) -> DenseFolderWriter:
        """Open the output for writing, as a temporary beside it; keep what is there to resume."""
        return DenseFolderWriter(self.output, self.layouts, self.files, resume)


def run_folder(
    job: FolderJob,
    *,
    resume: bool = True,
    progress: Callable[[Progress], None] | None = None,
) -> ExportReport:
    """Carry out a prepared export, and close its source.

    Args, Raises: as `sketchconv.export.run.run`.
    """
    started, peak = time.perf_counter(), 0
    try:
        journal = Journal(job.output, folder_fingerprint(job), resume=resume)
        with keeping(journal, len(job.infos), job.writer) as writer:
            for event in _events(job, writer, Noted(journal, writer, job.output)):
                peak = max(peak, anonymous_bytes())
                if progress is not None:
                    progress(event)
            writer.commit()
    finally:
        job.source.close()
    return ExportReport(
        job.source.id,
        tuple((str(job.output / name), size) for name, size in job.sizes.items()),
        job.parameters,
        dict(job.types),
        job.notes,
        job.source.nbytes,
        time.perf_counter() - started,
        peak,
    )


def warm_up(source: Source) -> None:
    """Load what decoding needs, so that a memory limit counts it as used."""
    floats = (i for i in source.infos.values() if i.dtype in FLOATS and 0 not in i.shape)
    for info in islice(floats, 1):
        source.float32(info.name, source.rows(info.name, 0, 1))


def check_folder(output: Path, source: Source, what: str) -> None:
    """Refuse an output that is no new folder.

    Args:
        output: the folder to make.
        source: which it must not replace.
        what: is made, for the message: "a dense model".

    Raises:
        OutputError: says what to do.
    """
    if output.suffix.lower() in _OTHER_FORMATS:
        raise OutputError(f"{output}: {what} is a folder; name one without that suffix")
    check_outputs(output.absolute().parent, {output.name: None}, source.paths, force=True)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise OutputError(f"{output}: exists already; {what} replaces nothing, remove it")


def _events(job: FolderJob, writer: DenseFolderWriter, noted: Noted) -> Iterator[Progress]:
    total, done = job.parameters, 0
    yield Progress("reading", "read", 0, total)
    tasks = (_task(job, info) for info in job.infos)
    for name, values in write_tasks(tasks, writer, noted, job.threads, job.budget):
        done += values
        yield Progress(name, "encode", done, total)


def _task(job: FolderJob, info: TensorInfo) -> Task:
    rows, share = row_count(info), job.budget // (job.threads + 1)
    columns, own = info.count // max(1, rows), job.source.infos[info.name]
    read = partial(job.source.rows, info.name)
    return Task(
        name=info.name,
        stored=job.parts.get(info.name, (info.name,)),
        rows=rows,
        columns=columns,
        step=max(1, min(share // _VALUE_BYTES, PIECE) // max(1, columns)),
        value_bytes=_VALUE_BYTES,
        encode=partial(job.encode, info),
        digest=partial(rows_digest, read, rows, own.nbytes // max(1, rows)),
    )


def dense_piece(source: Source, info: TensorInfo, begin: int, end: int) -> tuple[Piece]:
    """Rows in the dtype of the output; parameters must be finite, buffers may be anything.

    Raises:
        WeightError: a value that the dtype does not hold.
    """
    return ((info.name, _encoded(source, info, begin, end)),)


def _encoded(source: Source, info: TensorInfo, begin: int, end: int) -> bytes:
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
