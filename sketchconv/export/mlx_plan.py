"""Which weights of a sketch MLX holds exactly in its affine mode, and how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sketchconv.errors import SourceError
from sketchconv.export.folder import Piece
from sketchconv.export.mlx_pairs import fit, width_of
from sketchconv.formats.mlx_words import GROUP_SIZES, pack_words
from sketchconv.formats.packing import unpack
from sketchconv.formats.sketches import SketchRecord
from sketchconv.formats.tensors import TensorInfo, U8Array
from sketchconv.sources.checkpoint_view import SketchCheckpoint
from sketchconv.sources.sketch import split_rows

# Table entries that are looked at together: 6 MB of working memory, which caches hold.
_ENTRIES = 1 << 17
_SCALES = ("F16", "BF16")


@dataclass(frozen=True, slots=True)
class MlxWeight:
    """One weight in MLX's affine mode.

    Attributes:
        record: the sketch.
        bits: of an index; may be more than the sketch's.
        group_size: columns that share a scale and a bias; divides the sketch's groups.
        dtype: of scales and biases, and so of the decoded weight.
    """

    record: SketchRecord
    bits: int
    group_size: int
    dtype: str

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        """Words, scales and biases, by the names that MLX's modules give them."""
        (rows, columns), stem = self.record.shape, self.record.stem
        groups = rows, columns // self.group_size
        return (
            TensorInfo(f"{stem}.weight", "U32", (rows, columns * self.bits // 32)),
            TensorInfo(f"{stem}.scales", self.dtype, groups),
            TensorInfo(f"{stem}.biases", self.dtype, groups),
        )

    @property
    def settings(self) -> dict[str, Any]:
        """As MLX's configs say it."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": "affine"}

    @property
    def described(self) -> str:
        """The type in words."""
        return f"affine, {self.bits} bits, groups of {self.group_size}, {self.dtype} scales"

    def pieces(self, raw: bytes) -> Sequence[Piece]:
        """The bytes of words, scales and biases of some stored rows.

        Raises:
            SourceError: the rows are not those that the plan has seen.
        """
        index, tables = split_rows(self.record, raw)
        step = _rows_together(self.record)
        spans = (slice(at, at + step) for at in range(0, len(index), step))
        return [piece for rows in spans for piece in self._rows(index[rows], tables[rows])]

    def _rows(self, index: U8Array, tables: npt.NDArray[Any]) -> list[Piece]:
        record, pairs = self.record, fit(self.record, tables, self.dtype)
        if pairs is None:
            raise SourceError(
                f"{record.name}: the tables have changed since they were looked at; verify the"
                " sketch, and run the same command again"
            )
        codes = pairs.codes(unpack(index, record.bits, record.group_size))
        words = pack_words(codes.reshape(len(codes), -1), self.bits)
        repeats = record.group_size // self.group_size
        parts = (words, *(np.repeat(x, repeats, axis=1) for x in (pairs.scales, pairs.biases)))
        return [(i.name, part.tobytes()) for i, part in zip(self.infos, parts, strict=True)]


def exact_weights(source: SketchCheckpoint) -> dict[str, MlxWeight]:
    """Every sketched weight that MLX decodes to the same values, by name; reads the tables only.

    Scales have the dtype of the dense weight if that is exact, else the LUTs', else float32.

    Raises:
        SourceError: the file has become shorter.
    """
    found = {}
    for name, record in source.records.items():
        weight = _exact(source, record)
        if weight is not None:
            found[name] = weight
    return found


def inexact_reason(record: SketchRecord) -> str:
    """Why a weight is not among `exact_weights`."""
    if record.group_size % GROUP_SIZES[-1]:
        return f"its groups have {record.group_size} columns, no multiple of {GROUP_SIZES[-1]}"
    return "its LUTs are no equal steps that MLX computes to the last bit"


def common_settings(weights: Mapping[str, MlxWeight]) -> dict[str, Any]:
    """`quantization` of MLX's config: what most values have, and by module what differs."""
    counts: Counter[tuple[int, int]] = Counter()
    for weight in weights.values():
        rows, columns = weight.record.shape
        counts[weight.group_size, weight.bits] += rows * columns
    size, bits = counts.most_common(1)[0][0]
    usual = {"group_size": size, "bits": bits, "mode": "affine"}
    others = {w.record.stem: w.settings for w in weights.values() if w.settings != usual}
    return {**usual, **others}


def _exact(source: SketchCheckpoint, record: SketchRecord) -> MlxWeight | None:
    sizes = [size for size in GROUP_SIZES if record.group_size % size == 0]
    if not sizes:
        return None
    wanted = dict.fromkeys((record.dtype, record.lut_dtype, "F32"))
    for dtype in (d for d in wanted if d in (*_SCALES, "F32")):
        if _fits(source, record, dtype):
            return MlxWeight(record, width_of(record), sizes[0], dtype)
    return None


def _rows_together(record: SketchRecord) -> int:
    return max(1, _ENTRIES // (record.groups << record.bits))


def _fits(source: SketchCheckpoint, record: SketchRecord, dtype: str) -> bool:
    rows = record.shape[0]
    # The first rows alone tell most tables that do not fit.
    step, begin, most = 1, 0, _rows_together(record)
    while begin < rows:
        end = min(begin + step, rows)
        if fit(record, source.tables(record.name, begin, end), dtype) is None:
            return False
        begin, step = end, most
    return True
