"""Products of many tokens: tiles of the weight are decoded, and go to the vendor's BLAS.

A tile is small enough to stay in the second-level cache of the GPU, and no more than one is in
memory; a weight of up to `WHOLE_BYTES` is one tile. How 16-bit products are summed is up to the
BLAS and its settings in torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sketchconv.kernels.gpu.decode import tile

MOST_BYTES = 48 << 20  # of a tile; the cache of an H100 has 50 MB
WHOLE_BYTES = 8 << 20  # a weight up to this is one tile


def _size(length: int, nbytes: int) -> int:
    """Rows or columns of a tile, of `length` that take `nbytes` each: a power of two.

    On an H100, 4096 x 4096 weights in two tiles take 3 % longer than in one with 2048 tokens, and
    21 % with 512; in four, 15 % and 61 %.
    """
    most = 1 << max(MOST_BYTES // nbytes, 1).bit_length() - 1
    if length <= most and length * nbytes > WHOLE_BYTES:
        most = 1 << (-(-length // 2) - 1).bit_length()
    return min(length, most)


@torch.no_grad()
def multiply(x: Tensor, index: Tensor, lut: Tensor, y: Tensor, layout: str) -> None:
    """`y = x @ W.T` into `y` ``[tokens, rows]``, by tiles of rows; all contiguous but `x`."""
    rows, columns = lut.shape[0], x.shape[1]
    size = _size(rows, columns * x.element_size())
    room = x.new_empty(size, columns)
    for begin in range(0, rows, size):
        part = slice(begin, min(begin + size, rows))
        dense = room[: part.stop - begin]
        tile(index[part], lut[part], dense, columns, layout)
        torch.mm(x, dense.T, out=y[:, part])


@torch.no_grad()
def grad_input(grad: Tensor, index: Tensor, lut: Tensor, out: Tensor, layout: str) -> None:
    """`out = grad @ W` into `out` ``[tokens, columns]``, by tiles of columns, so that no partial
    sum is rounded; all contiguous.
    """
    rows, columns = lut.shape[0], out.shape[1]
    size = _size(columns, rows * grad.element_size())
    room = grad.new_empty(rows * size)
    for begin in range(0, columns, size):
        width = min(size, columns - begin)
        dense = room[: rows * width].view(rows, width)
        tile(index, lut, dense, columns, layout, begin)
        torch.mm(grad, dense, out=out[:, begin : begin + width])
