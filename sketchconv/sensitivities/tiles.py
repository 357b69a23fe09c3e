"""Products of matrices in tiles that no number of threads changes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from sketchconv.calibration.spans import one_thread
from sketchconv.kernels.threads import available_threads

if TYPE_CHECKING:
    from torch import Tensor

TILE = 256  # rows that one thread computes


def product(left: Tensor, right: Tensor, threads: int | None = None) -> Tensor:
    """``left @ right'`` for contiguous rows; None takes all cores."""
    out = torch.empty(len(left), len(right))

    def tile(begin: int) -> None:
        part = slice(begin, begin + TILE)
        torch.mm(left[part], right.T, out=out[part])

    starts = range(0, len(left), TILE)
    count = min(available_threads() if threads is None else threads, len(starts))
    with one_thread(torch.empty(0)):
        if count <= 1:
            for begin in starts:
                tile(begin)
            return out
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(tile, starts))
    return out
