"""Rows of an export's tensors as bytes: read, changed, checked, encoded; chunk by chunk."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from sketchconv.errors import WeightError
from sketchconv.export.encoders import ENCODERS
from sketchconv.export.plan import ExportStep
from sketchconv.export.tasks import Piece, Task, rows_digest
from sketchconv.sources.base import Source
from sketchconv.sources.forms import Forms
from sketchconv.sources.matrices import Matrices
from sketchconv.sources.values import row_count

Float32 = npt.NDArray[np.float32]
# Working copies of a value while it is encoded: MXFP4's encoder compares it with 16 others.
BYTES_PER_VALUE: Final = 96
_SPAN: Final = 64
# float32 bytes of a transposed tensor that is kept while its pieces are encoded.
KEPT_BYTES: Final = 64 << 20
# Values per piece at most.
PIECE: Final = 1 << 20


class RowReader(Protocol):
    """Where the rows of an export come from."""

    id: str
    format: str
    nbytes: int
    paths: tuple[Path, ...]

    def rows(self, step: ExportStep, begin: int, end: int) -> Float32:
        """Rows [begin, end) of the output as float32 ``[rows, columns]``."""

    def verbatim(self, step: ExportStep, begin: int, end: int) -> bytes:
        """The same rows as the source has them; only where the step says so."""

    def digest(self, step: ExportStep, *others: bytes) -> str:
        """SHA-256 of all that the source has of a step, and of what else decides its bytes."""

    def model(
        self, steps: Iterable[ExportStep]
    ) -> AbstractContextManager[tuple[Source, Mapping[str, str]]]:
        """The source as a model that can be run, and its names of the steps' tensors."""

    def close(self) -> None:
        """Close the source."""


class SourceRows:
    """Rows of a Hugging Face checkpoint or a sketch, in GGUF's order.

    Attributes:
        keep_bytes: float32 bytes of the largest transposed tensor that is kept as a whole; larger
            ones are read once for each of their pieces.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.id, self.format, self.nbytes = source.id, source.format, source.nbytes
        self.paths = source.paths
        self.keep_bytes = KEPT_BYTES
        self._lock = threading.Lock()
        self._kept: tuple[str, Float32] | None = None

    def rows(self, step: ExportStep, begin: int, end: int) -> Float32:
        """Rows of the output; a transposed tensor is read as a whole, if it can be kept.

        Raises:
            SourceError: the file has become shorter.
        """
        if step.source is None:
            return np.asarray([step.values], np.float32)
        if step.change == "transpose" and 4 * step.parameters > self.keep_bytes:
            return Matrices(self.source, Forms()).columns(step.source, begin, end)
        if step.change == "transpose":
            whole = self._whole(step.source, step.info.shape[-1])
            return np.array(whole[:, begin:end].T, order="C")
        if len(step.info.shape) == 1:
            values = self._read(step.source, 0, step.info.shape[0]).reshape(-1, 1)
            return np.ascontiguousarray(_changed(step, values, 0, len(values)).reshape(1, -1))
        first, last = span(step, begin, end)
        return _changed(step, self._read(step.source, first, last), begin - first, end - first)

    def _whole(self, name: str, rows: int) -> Float32:
        """A whole tensor; the last one is kept, so that all its pieces need one reading."""
        with self._lock:
            if self._kept is None or self._kept[0] != name:
                self._kept = None
                self._kept = name, self._read(name, 0, rows)
            return self._kept[1]

    def _read(self, name: str, begin: int, end: int) -> Float32:
        return self.source.float32(name, self.source.rows(name, begin, end))

    def verbatim(self, step: ExportStep, begin: int, end: int) -> bytes:
        """Blocks of a shaped sketch: what such a source has that GGUF has too."""
        from sketchconv.export.shaped import packed_blocks

        return packed_blocks(self.source, step, begin, end)

    def digest(self, step: ExportStep, *others: bytes) -> str:
        """SHA-256 of the source's bytes of a step's tensor, or of the step's own values."""
        if step.source is None:
            return rows_digest(lambda *_: b"", 0, 0, repr(step.values).encode(), *others)
        name, info = step.source, self.source.infos[step.source]
        rows = row_count(info)
        read = partial(self.source.rows, name)
        return rows_digest(read, rows, info.nbytes // max(1, rows), *others)

    def model(
        self, steps: Iterable[ExportStep]
    ) -> AbstractContextManager[tuple[Source, Mapping[str, str]]]:
        """The source itself."""
        names = {step.name: step.source for step in steps if step.source is not None}
        return nullcontext((self.source, names))

    def close(self) -> None:
        """Close the source."""
        self._kept = None
        self.source.close()


def span(step: ExportStep, begin: int, end: int) -> tuple[int, int]:
    """Rows of the source that hold rows [begin, end) of the output: whole heads for q and k."""
    if step.change not in ("rotary_q", "rotary_k"):
        return begin, end
    size = step.head_rows
    return begin // size * size, -(-end // size) * size


def _changed(step: ExportStep, values: Float32, begin: int, end: int) -> Float32:
    """Rows [begin, end) of what was read, after the step's change."""
    if step.change == "plus_one":
        return values[begin:end] + np.float32(1.0)
    if step.change in ("rotary_q", "rotary_k"):
        return values[rotary_order(np.arange(begin, end), step.head_rows)]
    return values[begin:end]


def rotary_order(rows: npt.NDArray[np.int64], head_rows: int) -> npt.NDArray[np.int64]:
    """Hugging Face's row for each row of GGUF: pairs side by side become halves of a head."""
    head, inner = np.divmod(rows, head_rows)
    index, half = np.divmod(inner, 2)
    found: npt.NDArray[np.int64] = head * head_rows + half * (head_rows // 2) + index
    return found


def tasks(
    reader: RowReader,
    steps: Iterable[ExportStep],
    budget: int,
    threads: int,
    importance: Mapping[str, Float32] = MappingProxyType({}),
) -> Iterator[Task]:
    """The tensors of an export, to be written in pieces of whole rows.

    Args:
        reader: where rows come from; read by several threads at once.
        steps: the tensors.
        budget: bytes of working memory for the pieces that are in work together.
        threads: that read and encode. The bytes do not depend on it.
        importance: GGUF name -> importance of each column, float32 ``[columns]``.
    """
    share = budget // (threads + 1)
    for step in steps:
        weights = importance.get(step.name)
        others = () if weights is None else (np.ascontiguousarray(weights).tobytes(),)
        yield Task(
            name=step.name,
            stored=(step.name,),
            rows=step.rows,
            columns=step.info.shape[-1],
            step=_piece_rows(step, share),
            value_bytes=BYTES_PER_VALUE,
            encode=partial(_pieces, reader, weights, step),
            digest=partial(reader.digest, step, *others),
        )


def _piece_rows(step: ExportStep, budget: int) -> int:
    """Rows of a piece by what the memory and the caches take."""
    size = max(1, min(budget // BYTES_PER_VALUE, PIECE) // step.info.shape[-1])
    return size - size % _SPAN if size > _SPAN else size


def _pieces(
    reader: RowReader, weights: Float32 | None, step: ExportStep, begin: int, end: int
) -> tuple[Piece]:
    return ((step.name, _encoded(reader, weights, step, begin, end)),)


def _encoded(
    reader: RowReader, weights: Float32 | None, step: ExportStep, begin: int, end: int
) -> bytes:
    """Rows [begin, end) of a step in its type. Raises WeightError or SourceError."""
    if step.verbatim:
        return reader.verbatim(step, begin, end)
    rows = np.ascontiguousarray(reader.rows(step, begin, end), np.float32)
    check_finite(step.source or step.name, rows, begin)
    try:
        blocks: Any = ENCODERS[step.info.type.name].encode(rows, weights)
    except WeightError as error:
        raise WeightError(f"{step.source or step.name}: {error}") from None
    data: bytes = blocks.tobytes()
    return data


def check_finite(name: str, rows: Float32, begin: int) -> None:
    """Refuse NaN and infinity by name, row and count; `begin` is the number of the first row.

    Raises:
        WeightError: at least one value is not finite.
    """
    finite = np.isfinite(rows)
    if finite.all():
        return
    counts = (~finite).sum(axis=1)
    row = int(counts.argmax())
    raise WeightError(
        f"{name}: {int(counts.sum())} values are NaN or infinite, the most in row {begin + row}"
        f" ({int(counts[row])}); repair the checkpoint"
    )
