"""One sketched weight at a time: the tuned weights on its index map, in chunks of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from sketchconv.errors import ProjectionError, WeightError
from sketchconv.formats.sketches import SketchRecord
from sketchconv.formats.tensors import carried_to_f32
from sketchconv.kernels.plain import unpack
from sketchconv.projection.metric import Codes, Metric
from sketchconv.sources.base import Float32
from sketchconv.sources.sketch import SketchSource, split_rows

# (first row, end) -> float32 rows of a dense checkpoint's weight
RowsOf = Callable[[int, int], Float32]
LUT_TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
# Rows are cut where the calibration cuts them, so that products are those of whole spans.
_SPAN = 128
# Bytes of a value while a chunk is in work: raw and float32 values of two checkpoints, the decoded
# base, what is left, weights, codes as bytes, and sums in float64.
_BYTES = 64


@dataclass(frozen=True, slots=True)
class Energies:
    """Squared norms of one weight, in the norm of the metric.

    Attributes:
        change: of the change that was projected.
        left: of what the LUTs could not take up of it, rounding to their dtype included.
        unrounded: of what LUTs of any precision could not take up.
        start: of the weights that the change is measured from.
        tuned: of the tuned weights.
        before: of their difference to the base sketch.
        after: of their difference to the base with the new LUTs.
    """

    change: float
    left: float
    unrounded: float
    start: float
    tuned: float
    before: float
    after: float

    @classmethod
    def sum(cls, parts: Sequence[Energies]) -> Energies:
        """Of all rows together."""
        columns = zip(*(astuple(part) for part in parts), strict=True)
        return cls(*(math.fsum(column) for column in columns))


@dataclass(frozen=True, slots=True)
class Projected:
    """A weight, or some of its rows, whose LUTs were fitted to tuned weights.

    Attributes:
        lut: the tuned LUTs ``[rows, groups, 2**bits]`` in the dtype of the base's.
        energies: what was fitted, and how well.
        changed: whether any entry differs from the base's.
    """

    lut: Tensor
    energies: Energies
    changed: bool


@dataclass(frozen=True, slots=True)
class SketchRows:
    """Rows of a free sketch: codes, and LUTs as they are stored and in float32."""

    codes: Codes
    lut: Tensor

    @property
    def values(self) -> Tensor:
        """The decoded rows: float32 ``[rows, columns]``."""
        return self.codes.spread(self.lut.float())


def sketch_rows(base: SketchSource, record: SketchRecord, begin: int, end: int) -> SketchRows:
    """Read rows of a sketch with free LUTs."""
    packed, carried = split_rows(record, base.rows(record.name, begin, end))
    codes = unpack(torch.from_numpy(packed), record.bits, record.group_size).flatten(1)
    values = torch.from_numpy(carried_to_f32(carried, record.lut_dtype))
    return SketchRows(
        Codes(codes, record.groups, 1 << record.bits), values.to(LUT_TYPES[record.lut_dtype])
    )


def spans(record: SketchRecord, budget: int) -> Iterator[tuple[int, int]]:
    """Runs of rows whose work fits in `budget` bytes; at least one row."""
    rows, columns = record.shape
    per_row = _BYTES * columns + 32 * (record.groups << record.bits)
    size = max(1, budget // per_row)
    size -= size % _SPAN if size > _SPAN else 0
    return ((begin, min(begin + size, rows)) for begin in range(0, rows, size))


def project(
    base: SketchSource,
    record: SketchRecord,
    tuned: RowsOf,
    dense: RowsOf | None,
    metric: Metric,
    budget: int,
) -> Projected:
    """Fit the LUTs of one weight to tuned weights by least squares.

    Args:
        base: the sketch, whose codes stay.
        record: of the weight; with free LUTs.
        tuned: its tuned weights.
        dense: those that the base was made from: the change ``tuned - dense`` is projected and
            added to the base's LUTs. None: ``tuned`` less the decoded base is, so that the LUTs
            become the (weighted) means of the tuned weights.
        metric: the norm.
        budget: bytes of working memory for the rows.

    Raises:
        WeightError: values that are not finite, or LUTs beyond their dtype.
    """
    parts = [
        _part(base, record, tuned(b, e), None if dense is None else dense(b, e), metric, b)
        for b, e in spans(record, budget)
    ]
    return Projected(
        torch.cat([part.lut for part in parts]),
        Energies.sum([part.energies for part in parts]),
        any(part.changed for part in parts),
    )


def _part(
    base: SketchSource,
    record: SketchRecord,
    tuned: Float32,
    dense: Float32 | None,
    metric: Metric,
    begin: int,
) -> Projected:
    rows = sketch_rows(base, record, begin, begin + len(tuned))
    wanted, decoded = torch.from_numpy(tuned), rows.values
    start = decoded if dense is None else torch.from_numpy(dense)
    change = wanted - start
    solved = metric.solve(rows.codes, change)
    lut = _stored(rows.lut, solved, record.name, begin)
    taken = rows.codes.spread(lut.float() - rows.lut.float())
    energies = Energies(
        change=metric.energy(change),
        left=metric.energy(change - taken),
        unrounded=metric.energy(change - rows.codes.spread(solved)),
        start=metric.energy(start),
        tuned=metric.energy(wanted),
        before=metric.energy(wanted - decoded),
        after=metric.energy(wanted - decoded - taken),
    )
    return Projected(lut, energies, not torch.equal(lut, rows.lut))


def _stored(lut: Tensor, change: Tensor, name: str, begin: int) -> Tensor:
    """Base LUT plus change in the base's dtype.

    Raises:
        WeightError: an entry is beyond the range of that dtype.
    """
    wide = lut.float() + change
    # An entry without a change keeps its bits, be they those of a negative zero.
    new = torch.where(change == 0, lut, wide.to(lut.dtype))
    bad = ~torch.isfinite(new.float()) & torch.isfinite(lut.float())
    if bad.any():
        row = int(bad.flatten(1).any(1).int().argmax())
        value = float(wide[row][bad[row]].flatten()[0])
        raise WeightError(
            f"{name}: row {begin + row}: {value:g} is beyond the range of the base's "
            f"{str(lut.dtype).removeprefix('torch.')} LUTs; sketch the base with --lut-dtype F32"
        )
    return new


def check_free(base: SketchSource) -> None:
    """Refuse sketches without LUTs.

    Raises:
        ProjectionError: names the first weight with a shaped sketch.
    """
    shaped = [record for record in base.records.values() if record.shaped]
    if shaped:
        raise ProjectionError(
            f"{base.id}: {shaped[0].name} has grid {shaped[0].grid}, scales in place of LUTs "
            f"({len(shaped)} such weights), so a LUT delta cannot change it; sketch the base "
            "with --grid free"
        )
    if not base.records:
        raise ProjectionError(f"{base.id}: holds no sketched weight")
