"""Sketches in plain torch operations, for every device and dtype: slow, tiled, differentiable.

The path of devices and dtypes without kernels of their own (tried on the CPU only, so far not on a
GPU), and the reference of the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sketchconv.kernels.planes import fields

TILE_ROWS = 256


def unpack(index: Tensor, bits: int, columns: int) -> Tensor:
    """Codes of a packed index: ``[rows, groups, bytes]`` to ``[rows, groups, columns]``, uint8.

    `columns` are those of one group.
    """
    codes = torch.zeros((*index.shape[:-1], columns), dtype=torch.uint8, device=index.device)
    base, first = 0, 0
    for width in fields(bits):
        size = -(-columns * width // 8)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=index.device)
        split = (index[..., base : base + size].unsqueeze(-1) >> shifts) & (2**width - 1)
        codes = codes | split.flatten(-2)[..., :columns] << first  # not in place, for `vmap`
        base, first = base + size, first + width
    return codes


def decode(index: Tensor, lut: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Dense rows ``[rows, columns]`` of a sketch, in `dtype`; `columns` are those of a row."""
    rows, groups, entries = lut.shape
    codes = unpack(index, entries.bit_length() - 1, columns // groups)
    return lut.to(dtype).gather(2, codes.long()).reshape(rows, columns)


def multiply(x: Tensor, index: Tensor, lut: Tensor) -> Tensor:
    """`x @ W.T` by tiles of decoded rows: ``[..., columns]`` to ``[..., rows]`` of one dtype."""
    rows, columns = lut.shape[0], x.shape[-1]
    parts = []
    for begin in range(0, rows, TILE_ROWS):
        tile = slice(begin, begin + TILE_ROWS)
        parts.append(x @ decode(index[tile], lut[tile], columns, x.dtype).T)
    return torch.cat(parts, -1)


def gather(ids: Tensor, index: Tensor, lut: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Rows `ids` (integers of any shape) of a sketch: ``[*ids.shape, columns]`` of `dtype`."""
    flat = ids.reshape(-1)
    return decode(index[flat], lut[flat], columns, dtype).view(*ids.shape, columns)


def multiply_tasks(x: Tensor, index: Tensor, luts: Tensor, tasks: Tensor) -> Tensor:
    """Products in which each token has the LUT of its own task, over one index.

    Args:
        x: ``[tokens, columns]`` of a float dtype.
        index: packed codes of the sketch.
        luts: ``[tasks, rows, groups, 2**bits]``.
        tasks: int64 ``[tokens]``, the task of each token.

    Returns:
        ``[tokens, rows]`` in the dtype of `x`: row t is ``multiply(x[t], index, luts[tasks[t]])``.

    Raises:
        ValueError: shapes do not fit together.
        IndexError: a task has no LUT.
    """
    if x.dim() != 2 or luts.dim() != 4 or tasks.shape != x.shape[:1]:
        raise ValueError(
            f"x is {tuple(x.shape)}, luts {tuple(luts.shape)}, tasks {tuple(tasks.shape)}; "
            "expected [tokens, columns], [tasks, rows, groups, entries], [tokens]"
        )
    y = x.new_zeros((x.shape[0], luts.shape[1]))
    for task in sorted(set(tasks.tolist())):
        if not 0 <= task < luts.shape[0]:
            raise IndexError(f"task {task} is not among {luts.shape[0]} LUTs")
        own = (tasks == task).nonzero().view(-1)
        y = y.index_copy(0, own, multiply(x[own], index, luts[task]))
    return y


def grad_input(grad: Tensor, index: Tensor, lut: Tensor, columns: int) -> Tensor:
    """`grad @ W` by tiles: ``[..., rows]`` to ``[..., columns]``, summed in float32 at least.

    Tiles are widened before they are multiplied: a product rounded to bfloat16 before it is added
    would lose what the sum keeps.
    """
    dtype = _sum_dtype(grad.dtype)
    total = grad.new_zeros((*grad.shape[:-1], columns), dtype=dtype)
    for begin in range(0, lut.shape[0], TILE_ROWS):
        tile = slice(begin, begin + TILE_ROWS)
        total += grad[..., tile].to(dtype) @ decode(index[tile], lut[tile], columns, dtype)
    return total.to(grad.dtype)


def grad_lut(grad: Tensor, x: Tensor, index: Tensor, lut: Tensor) -> Tensor:
    """Gradient of a LUT: the dense gradient `grad.T @ x` summed over the columns of each entry.

    Args:
        grad: gradient of the output, ``[tokens, rows]``.
        x: input, ``[tokens, columns]``.
        index: packed codes of the sketch.
        lut: ``[rows, groups, 2**bits]``.

    Returns:
        float32 (float64 for float64 input) of the LUT's shape, from sums of that dtype; only a tile
        of the dense gradient exists at any time.
    """
    dtype = _sum_dtype(x.dtype)
    wide = x.to(dtype)
    total = torch.zeros(lut.shape, dtype=dtype, device=lut.device)
    for begin in range(0, lut.shape[0], TILE_ROWS):
        tile = slice(begin, begin + TILE_ROWS)
        add_by_code(total[tile], index[tile], grad[:, tile].to(dtype).T @ wide)
    return total


def grad_gather(
    grad: Tensor, ids: Tensor, index: Tensor, lut: Tensor, padding: int | None = None
) -> Tensor:
    """Gradient of the LUT of a look-up of rows `ids`; only these are touched.

    Args:
        grad: ``[*ids.shape, columns]``.
        ids: rows that were looked up, any integer tensor.
        index: packed codes of the sketch.
        lut: ``[rows, groups, 2**bits]``, of which only the shape matters.
        padding: a row that gets no gradient.

    Returns:
        float32 (float64 for float64 input) of the LUT's shape.
    """
    rows, dense = summed_rows(grad, ids, padding)
    part = torch.zeros((rows.numel(), *lut.shape[1:]), dtype=dense.dtype, device=lut.device)
    add_by_code(part, index[rows], dense)
    total = torch.zeros(lut.shape, dtype=dense.dtype, device=lut.device)
    total[rows] = part
    return total


def summed_rows(grad: Tensor, ids: Tensor, padding: int | None) -> tuple[Tensor, Tensor]:
    """The rows that `ids` names, int64 and once each, and the sum of the gradients of each."""
    rows, places = torch.unique(ids.long(), return_inverse=True)
    columns = grad.shape[-1]
    dtype = _sum_dtype(grad.dtype)
    dense = torch.zeros((rows.numel(), columns), dtype=dtype, device=grad.device)
    dense.index_add_(0, places.view(-1), grad.reshape(-1, columns).to(dtype))
    if padding is not None:
        dense[rows == padding] = 0
    return rows, dense


def add_by_code(total: Tensor, index: Tensor, dense: Tensor) -> None:
    """`total[r, g, code[r, c]] += dense[r, c]` in place, with `dense` ``[rows, columns]``."""
    rows, groups, entries = total.shape
    width = dense.shape[1] // groups
    codes = unpack(index, entries.bit_length() - 1, width).long()
    total.scatter_add_(2, codes, dense.reshape(rows, groups, width))


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32
