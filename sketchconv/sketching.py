"""Rows of one weight to packed indices and LUTs: fitted here, or taken from a calibration."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sketchconv.chunks import Chunk
from sketchconv.errors import SketchconvError, WeightError

if TYPE_CHECKING:
    from sketchconv.calibration.factors import Factors
    from sketchconv.calibration.methods import Method
    from sketchconv.calibration.state import FinishedWeights
    from sketchconv.formats.manifest import SketchRecord
    from sketchconv.recipe import Recipe

Rows = npt.NDArray[np.float32]
# Rows whose decoded values are held at a time.
_ROWS = 256


@dataclass(frozen=True, slots=True)
class SketchedRows:
    """Rows of a sketch as they are stored.

    Attributes:
        packed: uint8 ``[rows, G, bytes]``.
        lut: ``[rows, G, 2**bits]``; float16, uint16 (BF16) or float32. Of shaped sketches the
            scales and minima, float16 ``[rows, G, fields]``.
        squared_error: float64 ``[rows]``, unweighted ``sum_c (w - decoded)**2``.
        squared_norm: float64 ``[rows]``, ``sum_c w**2``.
    """

    packed: npt.NDArray[np.uint8]
    lut: npt.NDArray[Any]
    squared_error: npt.NDArray[np.float64]
    squared_norm: npt.NDArray[np.float64]


def fitted_rows(
    chunk: Chunk,
    record: SketchRecord,
    rows: Rows,
    column_weights: npt.NDArray[np.float64] | None,
    *,
    exact: bool,
    threads: int | None,
) -> SketchedRows:
    """K-means without data, see `kernels.cpu.solve_rows`.

    Raises:
        WeightError: an entry overflows the LUT's dtype.
    """
    from sketchconv.kernels.cpu import LutRangeError, pack_rows, solve_rows

    try:
        solved = solve_rows(
            rows,
            record.bits,
            record.groups,
            column_weights=column_weights,
            lut_dtype=record.lut_dtype,
            threads=threads,
            exact=exact,
        )
    except LutRangeError as error:
        raise WeightError(
            f"{record.name}: row {chunk.begin + error.row}: {error.value:g} is beyond the range of "
            f"a {error.lut_dtype} LUT; choose --lut-dtype BF16 or F32"
        ) from None
    packed = pack_rows(solved.indices, record.bits, record.groups, threads=threads)
    return SketchedRows(packed, solved.lut, solved.squared_error, solved.squared_norm)


def method_rows(
    record: SketchRecord,
    rows: Rows,
    method: Method,
    factors: Factors | None = None,
    column_weights: npt.NDArray[np.float64] | None = None,
    *,
    threads: int | None,
) -> SketchedRows:
    """A method that needs no data, or none but second moments that come with `factors`.

    Raises:
        WeightError: the weight cannot be sketched.
    """
    import torch

    from sketchconv.calibration.solve import solve
    from sketchconv.kernels.cpu import LutRangeError, pack_rows

    weight = torch.from_numpy(rows)
    try:
        solved = solve(
            *(weight, record.bits, record.groups, record.lut_dtype, method),
            statistics=None if factors is None else factors.statistics,
            column_weights=None if column_weights is None else torch.from_numpy(column_weights),
            threads=threads,
            factors=factors,
            grid=record.grid,
        )
    except LutRangeError as error:
        raise WeightError(f"{record.name}: {error}; try --lut-dtype BF16 or F32") from None
    except SketchconvError as error:
        raise WeightError(f"{record.name}: {error}") from None
    codes = np.ascontiguousarray(solved.indices.numpy())
    packed = pack_rows(codes, record.bits, record.groups, threads=threads)
    errors, norms = solved.squared_error.numpy(), solved.squared_norm.numpy()
    return SketchedRows(packed, _carrier(solved.lut), errors, norms)


def ready_rows(packed: npt.NDArray[np.uint8], lut: npt.NDArray[Any]) -> SketchedRows:
    """Rows that the source has as a sketch already: they are its values, without an error."""
    return SketchedRows(packed, lut, np.zeros(len(packed)), np.zeros(len(packed)))


def finished_rows(
    finished: FinishedWeights, record: SketchRecord, chunk: Chunk, rows: Rows
) -> SketchedRows:
    """Rows that a calibration has left, with the errors that they have now."""
    from sketchconv.formats.packing import unpack

    index, lut = finished.rows(record, chunk.begin, chunk.end)
    if record.shaped:
        from sketchconv.shaping import finished_errors

        errors, norms = finished_errors(record, index.numpy(), lut.numpy(), rows)
        return SketchedRows(index.numpy(), lut.numpy(), errors, norms)
    packed = index.numpy()
    error, norm = np.empty(len(rows)), np.empty(len(rows))
    for begin in range(0, len(rows), _ROWS):
        part = slice(begin, min(begin + _ROWS, len(rows)))
        codes = unpack(packed[part], record.bits, record.group_size)
        decoded = np.take_along_axis(lut[part].float().numpy(), codes.astype(np.intp), axis=2)
        dense = rows[part].astype(np.float64)
        error[part] = np.square(dense - decoded.reshape(dense.shape)).sum(axis=1)
        norm[part] = np.square(dense).sum(axis=1)
    return SketchedRows(packed, _carrier(lut), error, norm)


def _carrier(lut: Any) -> npt.NDArray[Any]:
    """A LUT as NumPy stores it; bfloat16 as its 16 bits."""
    import torch

    bits = lut.view(torch.uint16) if lut.dtype is torch.bfloat16 else lut
    array: npt.NDArray[Any] = bits.contiguous().numpy()
    return array


def compile_solver(recipe: Recipe) -> float:
    """Have the solver compiled, or read from its cache, before its time is measured.

    Returns:
        Seconds.
    """
    from sketchconv.kernels.cpu import pack_rows, solve_rows

    started = time.perf_counter()
    rows = np.ones((1, 256), np.float32)
    weights = None if recipe.weighting == "equal" else np.ones(256)
    solved = solve_rows(rows, 4, 1, column_weights=weights, exact=recipe.exact)
    pack_rows(solved.indices, 4, 1)
    return time.perf_counter() - started
