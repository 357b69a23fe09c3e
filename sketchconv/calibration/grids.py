"""Grids: the LUTs that rounding starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from sketchconv.errors import RecipeError
from sketchconv.kernels.cpu import LutRangeError, solve_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from sketchconv.calibration.methods import Method

MOST_LINSPACE = 8
LUT_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def make_grid(
    weight: Tensor, bits: int, groups: int, method: Method, column_weights: Tensor | None,
    threads: int | None,
) -> Tensor:  # fmt: skip
    """LUTs for a weight by the method's grid.

    Args:
        weight: float32 ``[out, in]``.
        bits: index width.
        groups: per row, over consecutive columns.
        method: its grid and solver.
        column_weights: float64 ``[in]`` for the k-means; None: equal.
        threads: of the k-means.

    Returns:
        float32 ``[out, groups, 2**bits]`` on the weight's device, ascending.
    """
    if method.grid == "affine":
        return _affine(weight, bits, groups)
    rows = np.require(weight.cpu().numpy(), requirements=["C", "W"])
    masses = None if column_weights is None else column_weights.cpu().double().numpy()
    if method.solver == "sklearn":
        lut = _sklearn(rows, bits, groups, masses)
    else:
        lut = solve_rows(
            rows, bits, groups, column_weights=masses, lut_dtype="F32", threads=threads
        ).lut
    return torch.from_numpy(lut).to(weight.device)


def _affine(weight: Tensor, bits: int, groups: int) -> Tensor:
    """Equal steps between the extremes of each group, moved so that 0 is an entry (GPTQ's)."""
    parts = weight.reshape(weight.shape[0], groups, -1)
    low = parts.amin(-1, keepdim=True).clamp(max=0)
    high = parts.amax(-1, keepdim=True).clamp(min=0)
    top = (1 << bits) - 1
    step = (high - low) / top
    step = torch.where(step > 0, step, torch.ones_like(step))
    zero = (-low / step).round()
    return (torch.arange(top + 1, device=weight.device) - zero) * step


def _sklearn(
    rows: NDArray[np.float32], bits: int, groups: int, masses: NDArray[np.float64] | None
) -> NDArray[np.float32]:
    """scikit-learn's KMeans as the LeanQuant code calls it: its start decides much of the error."""
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise RecipeError(
            "method leanquant is the published recipe and needs scikit-learn: pip install "
            "'sketchconv[bench]', or choose --method sketch"
        ) from error
    k = 1 << bits
    parts = rows.reshape(rows.shape[0] * groups, -1)
    lut = np.empty((parts.shape[0], k), np.float32)
    for place, part in enumerate(parts):
        column = part.astype(np.float64)[:, None]
        distinct = np.unique(column)
        if distinct.size <= k:
            lut[place] = np.concatenate([distinct, np.full(k - distinct.size, distinct[-1])])
            continue
        linspace = k <= MOST_LINSPACE
        start = np.linspace(column.min(), column.max(), k)[:, None] if linspace else "k-means++"
        model = KMeans(k, init=start, n_init=1 if linspace else "auto", max_iter=100, tol=1e-6,
                       random_state=0)  # fmt: skip
        group = place % groups
        own = None if masses is None else masses.reshape(groups, -1)[group]
        lut[place] = np.sort(model.fit(column, sample_weight=own).cluster_centers_[:, 0])
    return lut.reshape(rows.shape[0], groups, k)


def cast_lut(lut: Tensor, name: str) -> Tensor:
    """`lut`, float32 ``[rows, groups, k]``, in the dtype that is stored.

    Raises:
        LutRangeError: an entry is beyond the range of that dtype.
    """
    cast = lut.to(LUT_DTYPES[name])
    if not bool(torch.isfinite(cast).all()):
        row = int((~torch.isfinite(cast)).flatten(1).any(1).nonzero()[0])
        values = lut[row].flatten()
        raise LutRangeError(row, float(values[values.abs().argmax()]), name)
    return cast
