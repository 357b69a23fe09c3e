"""Spans: a weight's rows shared out between threads, or in turn on a GPU.

Rows are independent. On the CPU a weight is cut into spans of a fixed number of rows, and each is
solved by one thread whose matrix products use no other: no result depends on how many there are.
Torch's products may differ in their last bits from one kind of CPU to another, and on a GPU: there
a few codes turn, and the error of a layer stays within half a percent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

from sketchconv.calibration.grids import cast_lut, make_grid
from sketchconv.calibration.rows import Fit, fit_rows
from sketchconv.calibration.shaped import ShapedRows, luts_of, start
from sketchconv.formats.grids import FREE
from sketchconv.kernels.tables import encode, make_tables
from sketchconv.kernels.threads import available_threads

if TYPE_CHECKING:
    from torch import Tensor

    from sketchconv.calibration.factors import Factor
    from sketchconv.calibration.methods import Method

SPAN = 128
SPAN_GPU = 4096
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of a weight.

    Attributes:
        bits: index width.
        groups: LUTs per row.
        lut_dtype: "F16", "BF16" or "F32".
        method: how.
        threads: None: all cores.
        grid: ``"free"``, or the shape of the LUTs, a key of `formats.grids.GRIDS`.
    """

    bits: int
    groups: int
    lut_dtype: str
    method: Method
    threads: int | None = None
    grid: str = FREE


@contextmanager
def one_thread(weight: Tensor) -> Iterator[None]:
    """Torch on one thread, for sums whose order must not depend on the machine's load or cores."""
    before = torch.get_num_threads()
    if not weight.is_cpu or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fit(
    weight: Tensor,
    request: Request,
    factor: Factor,
    judge: Tensor | None,
    column_weights: Tensor | None = None,
) -> Fit:
    """Grid, codes and LUTs for all rows.

    Args:
        weight: float32 ``[out, in]``, columns in their original order.
        request: what is asked.
        factor: of the damped Hessian.
        judge: held-out Hessian, columns in their original order.
        column_weights: ``[in]`` for the k-means, in place of those by the method's powers.

    Returns:
        Codes with columns in the order of the factor, and LUTs; of a shaped sketch scales.
    """
    method = request.method
    make = _grid if request.grid == FREE else _scales
    if column_weights is not None:
        grids = [make(weight, request, column_weights)]
    else:
        powers = (sensitivities(factor, power) if power else None for power in method.powers)
        grids = [make(weight, request, masses) for masses in powers]
    ordered = weight[:, factor.order]
    groups = factor.order // (weight.shape[1] // request.groups)
    ruler = None if judge is None or not method.rounds else judge[factor.order][:, factor.order]

    def work(begin: int, end: int) -> Fit:
        starts = [grid[begin:end] for grid in grids]
        if request.grid != FREE:
            shape = request.grid, request.bits
            return ShapedRows(ordered[begin:end], groups, factor, method, *shape).fit(starts, ruler)
        return fit_rows(ordered[begin:end], starts, groups, factor, method, ruler)

    return joined(spread(work, weight, request.threads))


def fit_plain(weight: Tensor, request: Request, column_weights: Tensor | None) -> Fit:
    """The same without statistics: each weight to its nearest entry."""
    if request.grid != FREE:
        asked = request.grid, request.bits, request.groups
        return start(weight, *asked, column_weights, request.threads)
    method, name = request.method, request.lut_dtype
    lut = make_grid(weight, request.bits, request.groups, method, column_weights, request.threads)
    stored = cast_lut(lut, name)
    size = weight.shape[1] // request.groups
    groups = torch.arange(weight.shape[1], device=weight.device) // size

    def work(begin: int, end: int) -> Fit:
        rows = stored[begin:end]
        return Fit(encode(weight[begin:end], make_tables(rows.float(), groups)), rows)

    return joined(spread(work, weight, request.threads))


def _grid(weight: Tensor, request: Request, masses: Tensor | None) -> Tensor:
    lut = make_grid(weight, request.bits, request.groups, request.method, masses, request.threads)
    return cast_lut(lut, request.lut_dtype)


def _scales(weight: Tensor, request: Request, masses: Tensor | None) -> Tensor:
    asked = request.grid, request.bits, request.groups
    return start(weight, *asked, masses, request.threads).lut


def opened(found: Fit, request: Request) -> Fit:
    """The same with LUTs: those of a shaped sketch, float32, in the order of its levels."""
    if request.grid == FREE:
        return found
    return Fit(found.codes, luts_of(found.lut, request.grid, request.bits))


def sensitivities(factor: Factor, power: float) -> Tensor:
    """K-means weights ``diag(U)^-power`` of the original columns: float64 ``[in]``.

    The diagonal of U is the error that is left of a column's rounding after compensation.
    """
    weights = factor.upper.diagonal().double() ** -power
    return weights[factor.order.argsort()] / weights.max()


def spread(work: Callable[[int, int], T], weight: Tensor, threads: int | None) -> list[T]:
    """``work(begin, end)`` for every span of the weight's rows, in their order.

    Args:
        work: must depend on nothing but its span.
        weight: ``[rows, in]`` on the device of the work.
        threads: that share the spans on the CPU; None: all cores. No result depends on it.
    """
    rows = weight.shape[0]
    step = SPAN if weight.is_cpu else SPAN_GPU
    starts = range(0, rows, step)
    count = min(available_threads() if threads is None else threads, len(starts))
    if count <= 1 or not weight.is_cpu:
        with one_thread(weight):
            return [work(begin, min(begin + step, rows)) for begin in starts]
    before = torch.get_num_threads()
    try:
        # Torch keeps its number of threads per thread, but new ones take the number set last.
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(lambda begin: work(begin, min(begin + step, rows)), starts))
    finally:
        torch.set_num_threads(before)


def joined(parts: list[Fit]) -> Fit:
    """The rows of all parts."""
    return Fit(torch.cat([part.codes for part in parts]), torch.cat([part.lut for part in parts]))
