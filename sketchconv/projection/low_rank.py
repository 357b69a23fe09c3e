"""The best approximation of a matrix by one of low rank, and what each rank keeps of its energy.

By Eckart and Young the best rank-r approximation keeps ``s_1^2 + ... + s_r^2`` of ``|D|^2``, with
the singular values s in descending order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Up to this smaller side the decomposition is exact: 2.5 s for 2048 on one core.
EXACT = 2048
_SEED = 0
_PIECE = 4 << 20  # values in float64 at a time
_OVERSAMPLING = 16
_ITERATIONS = 4


@dataclass(frozen=True, slots=True)
class LowRank:
    """``left @ right`` of rank r, close to a matrix D.

    Attributes:
        left: float32 ``[out, r]``.
        right: float32 ``[r, in]``; each pair of column and row has equal norms.
        energy: ``|D|^2``.
        kept: float64, what ranks 1, 2, ... keep of it, summed up: all of them where `exact`, else
            the first r.
        exact: whether the decomposition was.
    """

    left: Tensor
    right: Tensor
    energy: float
    kept: Tensor
    exact: bool

    @property
    def captured(self) -> float:
        """The energy that `left @ right` keeps."""
        rank = self.left.shape[1]
        return float(self.kept[min(rank, len(self.kept)) - 1]) if len(self.kept) else 0.0


def spectrum(matrix: Tensor) -> Tensor:
    """Squared singular values in descending order: float64 ``[min(out, in)]``.

    They are the eigenvalues of the smaller Gram matrix in float64. What it loses of singular
    values below 1e-8 of the largest has no part in any share of the energy.

    Args:
        matrix: float32 ``[out, in]``.
    """
    values: Tensor = torch.linalg.eigvalsh(_gram(matrix))
    return values.flip(0).clamp_min(0.0)


def rank_for(energies: Tensor, share: float) -> int:
    """The least rank that keeps a share of the energy; 0 for a matrix of zeros.

    Args:
        energies: squared singular values, descending.
        share: between 0 and 1.
    """
    sums = energies.cumsum(0)
    if not len(sums) or float(sums[-1]) <= 0:
        return 0
    # A rounding error of the sums must not ask for a rank of which nothing is left.
    wanted = share * float(sums[-1]) * (1 - 1e-12)
    return int((sums < wanted).sum()) + 1


def truncate(matrix: Tensor, rank: int, *, exact: bool | None = None) -> LowRank:
    """The best approximation of rank at most `rank`, zeros behind the matrix's own rank.

    Large matrices are decomposed by a randomised range finder with power iterations (Halko,
    Martinsson and Tropp 2011, algorithm 4.4) from a fixed seed, which keeps a little less.

    Args:
        matrix: float32 ``[out, in]``.
        rank: at least 1; beyond the smaller side the rest is zeros.
        exact: None decides by the size.
    """
    rows, columns = matrix.shape
    if rows > columns:
        turned = truncate(matrix.t().contiguous(), rank, exact=exact)
        return LowRank(
            turned.right.t().contiguous(), turned.left.t().contiguous(),
            turned.energy, turned.kept, turned.exact,
        )  # fmt: skip
    energy = float(matrix.double().square().sum())
    whole = (rows <= EXACT) if exact is None else exact
    basis, energies = _exact(matrix) if whole else _sketched(matrix, rank)
    found = min(rank, basis.shape[1])
    left = basis[:, :found].float()
    right = left.t() @ matrix
    left, right = _balanced(_signed(left, right))
    kept = energies.cumsum(0) if whole else energies[:found].cumsum(0)
    return LowRank(_padded(left, 1, rank), _padded(right, 0, rank), energy, kept, whole)


def _gram(matrix: Tensor) -> Tensor:
    """The smaller Gram matrix, from float64 copies of a few columns (or rows) at a time."""
    tall = matrix if matrix.shape[0] > matrix.shape[1] else matrix.t()
    total = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    step = max(1, _PIECE // tall.shape[1])
    for begin in range(0, len(tall), step):
        part = tall[begin : begin + step].double()
        total.addmm_(part.t(), part)
    return total


def _exact(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors and squared singular values, descending."""
    values, vectors = torch.linalg.eigh(_gram(matrix))
    return vectors.flip(1), values.flip(0).clamp_min(0.0)


def _sketched(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    rows, columns = matrix.shape
    width = min(rank + _OVERSAMPLING, rows)
    start = np.random.default_rng(_SEED).standard_normal((columns, width), np.float32)
    basis = torch.linalg.qr(matrix @ torch.from_numpy(start)).Q
    for _ in range(_ITERATIONS):
        across = torch.linalg.qr(matrix.t() @ basis).Q
        basis = torch.linalg.qr(matrix @ across).Q
    vectors, values = _exact(basis.t() @ matrix)
    return basis.double() @ vectors, values


def _signed(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Signs are free: the largest entry of each column of `left` is positive."""
    peak = left.gather(0, left.abs().argmax(0, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0)
    return left * sign, right * sign.t()


def _balanced(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Both factors get the square root of each singular value."""
    left, right = pair
    norms = right.norm(dim=1)
    scale = norms.sqrt()
    inverse = torch.where(norms > 0, 1 / scale, torch.zeros_like(scale))
    return left * scale, right * inverse[:, None]


def _padded(values: Tensor, axis: int, size: int) -> Tensor:
    short = size - values.shape[axis]
    if short <= 0:
        return values.contiguous()
    shape = list(values.shape)
    shape[axis] = short
    return torch.cat((values, values.new_zeros(shape)), dim=axis).contiguous()
