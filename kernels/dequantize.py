"""Rows of sketched matrices as dense floats: tiles, whole matrices and embedding look-ups."""

from __future__ import annotations

import torch
from torch import Tensor

from sketchconv.kernels.crew import share
from sketchconv.kernels.dispatch import choose
from sketchconv.kernels.packed import Packed

PARALLEL_WEIGHTS = 1 << 21
_OUTPUTS = {torch.float32: "F32", torch.bfloat16: "BF16"}


def _run(matrix: Packed, out: Tensor, begin: int, ids: Tensor | None, kernel: str | None) -> None:
    row_lut = matrix.lut.element_size() * matrix.groups << matrix.bits
    row_index = matrix.index.shape[1] * matrix.index.shape[2]
    kind = (matrix.bits, matrix.lut_dtype, _OUTPUTS[out.dtype], matrix.order)
    run = choose(kernel).decode(*kind)
    args = (
        matrix.index_pointer + begin * row_index,
        matrix.lut_pointer + begin * row_lut,
        0 if ids is None else ids.data_ptr(),
        out.data_ptr(),
        matrix.groups,
        matrix.group_columns,
    )
    threads = torch.get_num_threads() if out.numel() >= PARALLEL_WEIGHTS else 1

    share(run, out.shape[0], args, threads)


def decode_into(matrix: Packed, out: Tensor, begin: int = 0, kernel: str | None = None) -> None:
    """Decode rows `begin` and following into `out`.

    Args:
        matrix: the sketch, `[rows, columns]`.
        out: contiguous float32 or bfloat16 ``[count, columns]`` in CPU memory. float32 is exact;
            bfloat16 is rounded to nearest, ties to even.
        begin: first row.
        kernel: name of the kernels to use; None takes the fastest.

    Raises:
        ValueError: `out` does not fit, or the rows are not in the matrix.
    """
    if out.dtype not in _OUTPUTS or not out.is_contiguous() or out.device.type != "cpu":
        raise ValueError(f"out must be contiguous float32 or bfloat16 on the CPU, got {out.dtype}")
    if out.dim() != 2 or out.shape[1] != matrix.columns:
        raise ValueError(f"out is {tuple(out.shape)}, rows have {matrix.columns} columns")
    if begin < 0 or begin + out.shape[0] > matrix.rows:
        raise ValueError(f"rows {begin} to {begin + out.shape[0]} are not among {matrix.rows} rows")
    _run(matrix, out, begin, None, kernel)


def decode(
    matrix: Packed,
    dtype: torch.dtype = torch.float32,
    begin: int = 0,
    end: int | None = None,
    kernel: str | None = None,
) -> Tensor:
    """Rows `begin` to `end` as a dense tensor ``[end - begin, columns]`` of a float `dtype`."""
    stop = matrix.rows if end is None else end
    via = dtype if dtype in _OUTPUTS else torch.float32
    out = torch.empty((max(stop - begin, 0), matrix.columns), dtype=via, device="cpu")
    decode_into(matrix, out, begin, kernel)
    return out.to(dtype)


def gather(
    matrix: Packed, ids: Tensor, dtype: torch.dtype = torch.float32, kernel: str | None = None
) -> Tensor:
    """Embedding look-up: rows `ids` (any integer tensor) as ``[*ids.shape, columns]``.

    Raises:
        IndexError: an id is negative or not below the number of rows.
    """
    rows = ids.detach().to(torch.int64).contiguous().view(-1)
    if rows.numel():
        low, high = (int(v) for v in torch.aminmax(rows))
        if low < 0 or high >= matrix.rows:
            bad = low if low < 0 else high
            raise IndexError(f"id {bad} is outside an embedding of {matrix.rows} rows")
    via = dtype if dtype in _OUTPUTS else torch.float32
    out = torch.empty((rows.numel(), matrix.columns), dtype=via, device="cpu")
    if rows.numel():
        _run(matrix, out, 0, rows, kernel)
    return out.view(*ids.shape, matrix.columns).to(dtype)
