"""Several deltas of one base in one: task arithmetic on lookup tables."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Final

import numpy as np

from sketchconv.deltas.binding import check_fit
from sketchconv.deltas.making import coding_of, plain_task, write_delta
from sketchconv.deltas.resolving import tuned_table
from sketchconv.deltas.summary import DeltaSummary
from sketchconv.deltas.tables import refuse_sources, stored_table
from sketchconv.errors import DeltaError
from sketchconv.formats.delta import DeltaFile
from sketchconv.formats.delta_coding import Table, finite, rounded
from sketchconv.formats.delta_writer import DeltaWriter
from sketchconv.formats.reader import SktchModel
from sketchconv.formats.tensors import carried_to_f32

_MOST: Final = float(np.finfo(np.float32).max)
Weighted = tuple[DeltaFile, float]


def merge(
    deltas: Sequence[tuple[str | os.PathLike[str], float]],
    output: str | os.PathLike[str],
    base: str | os.PathLike[str],
    *,
    dtype: str = "same",
    mode: str | None = None,
    span: int | None = None,
    task: Mapping[str, Any] | None = None,
    force: bool = False,
) -> DeltaSummary:
    """Write one delta of `base + sum_i w_i * (tuned_i - base)` (Ilharco et al. 2023).

    Products and sums are float32, each rounded; terms are added in the order of the deltas' seals,
    whatever order they are given in; the base is added last, and the result rounded to the base's
    dtype. Entries that no delta changes keep their bits.

    Args:
        deltas: paths and weights; all of them made for `base`.
        output, dtype, mode, span, force: as `create`.
        base: the sketch.
        task: free JSON; the deltas and their weights are added to it under `merged`.

    Raises:
        DeltaError: a delta was not made for this base, a weight is not finite, or the sum leaves
            the range of the base's dtype.
        FormatError, OutputError: as `create`.
    """
    coding = coding_of(dtype, mode, span)
    if not deltas:
        raise DeltaError("nothing to merge: give at least one delta")
    given = plain_task(task or {})
    refuse_sources(output, base, *(path for path, _ in deltas))
    with ExitStack() as stack:
        model = stack.enter_context(SktchModel.open(base))
        files = [(stack.enter_context(DeltaFile.open(path)), float(w)) for path, w in deltas]
        for file, weight in files:
            if not abs(weight) <= _MOST:
                raise DeltaError(f"{file.path.name}: the weight {weight} is not finite")
            check_fit(file, model)
        files.sort(key=lambda pair: (pair[0].seal, pair[1]))
        described = plain_task({**given, "merged": [_described(*pair) for pair in files]})
        writer = stack.enter_context(DeltaWriter(output, coding, overwrite=force))
        return write_delta(writer, model, _merged(model, files), described)


def combine(base: Table, tuned: Sequence[Table], weights: Sequence[float], lut: str) -> Table:
    """One table of several: `base + sum_i w_i * (tuned_i - base)` in float32, in this order.

    Args:
        base: `[out, G, K]` in the carrier of `lut`.
        tuned: tables of the same shape.
        weights: one for each.
        lut: F16, BF16 or F32.
    """
    plain = carried_to_f32(base, lut)
    total = np.zeros_like(plain)
    changed = np.zeros(plain.shape, np.bool_)
    with np.errstate(over="ignore", invalid="ignore"):
        for table, weight in zip(tuned, weights, strict=True):
            values = carried_to_f32(table, lut)
            total += np.float32(weight) * (values - plain)
            changed |= values.view(np.uint32) != plain.view(np.uint32)
        return np.where(changed, rounded(plain + total, lut), base)


def _merged(model: SktchModel, files: Sequence[Weighted]) -> Iterator[tuple[str, Table]]:
    for name in sorted({name for file, _ in files for name in file.document.weights}):
        base = stored_table(model, name)
        own = [(file, w) for file, w in files if name in file.document.weights]
        tuned = [tuned_table(file, name, base) for file, _ in own]
        lut = model.manifest.sketches[name].lut_dtype
        table = combine(base, tuned, [w for _, w in own], lut)
        if not finite(table, lut).all():
            raise DeltaError(f"{name}: the sum leaves the range of {lut}; take smaller weights")
        yield name, table


def _described(file: DeltaFile, weight: float) -> dict[str, Any]:
    return {"delta": file.seal, "name": file.document.task.get("name"), "weight": repr(weight)}
