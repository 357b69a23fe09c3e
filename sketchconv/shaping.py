"""Rows of one weight to shaped sketches, without data: codes and float16 scales."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sketchconv.errors import WeightError
from sketchconv.sketching import SketchedRows

if TYPE_CHECKING:
    import numpy.typing as npt

    from sketchconv.chunks import Chunk
    from sketchconv.formats.manifest import SketchRecord
    from sketchconv.kernels.ggml.shaped import Shaped

# Rows whose decoded values are held at a time.
_ROWS = 256


def shaped_rows(
    chunk: Chunk,
    record: SketchRecord,
    rows: npt.NDArray[np.float32],
    column_weights: npt.NDArray[np.float64] | None,
    *,
    threads: int | None,
) -> SketchedRows:
    """Scales, minima and codes with the least weighted squared error, see `kernels.ggml.shaped`.

    Raises:
        WeightError: a value is beyond the reach of the grid's scales.
    """
    from sketchconv.kernels.cpu import pack_rows
    from sketchconv.kernels.ggml.shaped import fit, key_of

    key = key_of(record.grid, record.bits)
    try:
        found = fit(rows, key, record.group_size, relative(column_weights), threads)
    except ValueError as error:
        raise WeightError(
            f"{record.name}: {error} (rows are counted from {chunk.begin}); choose --grid free "
            "with --lut-dtype BF16 or F32"
        ) from None
    table = table_of(found)
    packed = pack_rows(found.codes, record.bits, record.groups, threads=threads)
    return SketchedRows(packed, table, *finished_errors(record, packed, table, rows))


def finished_errors(
    record: SketchRecord,
    packed: npt.NDArray[np.uint8],
    table: npt.NDArray[np.float16],
    rows: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Squared errors and squared norms of rows that are sketched: float64 ``[rows]`` each."""
    from sketchconv.kernels.ggml.expand import expand_rows

    errors, norms = np.empty(len(rows)), np.empty(len(rows))
    for begin in range(0, len(rows), _ROWS):
        part = slice(begin, begin + _ROWS)
        decoded = np.empty(rows[part].shape, np.float32)
        widened = table[part].astype(np.float32)
        expand_rows(packed[part], widened, record.grid, record.bits, decoded, 1)
        dense = rows[part].astype(np.float64)
        errors[part] = np.square(dense - decoded).sum(axis=1)
        norms[part] = np.square(dense).sum(axis=1)
    return errors, norms


def relative(weights: npt.NDArray[np.float64] | None) -> npt.NDArray[np.float32] | None:
    """Column weights as the fit takes them: only their ratios matter."""
    if weights is None:
        return None
    largest = float(weights.max(initial=0.0))
    return (weights / largest if largest > 0 else weights).astype(np.float32)


def table_of(found: Shaped) -> npt.NDArray[np.float16]:
    """Scales and minima as they are stored: ``[rows, groups, fields]``."""
    fields: list[Any] = [found.scale, *([] if found.minimum is None else [found.minimum])]
    return np.stack(fields, axis=-1)
