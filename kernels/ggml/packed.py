"""A shaped sketch as it lies in memory, checked once, and its products for few tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from sketchconv.kernels.atomics import entry_of
from sketchconv.kernels.crew import MULTIPLY_ARGS, share
from sketchconv.kernels.gemv import PARALLEL_WEIGHTS
from sketchconv.kernels.ggml.dots import BLOCK
from sketchconv.kernels.ggml.gemv import chosen_kernel
from sketchconv.kernels.ggml.shaped import GRIDS, key_of
from sketchconv.kernels.planes import packed_size


@dataclass(frozen=True, slots=True, eq=False)
class PackedShaped:
    """Checked views of one shaped sketch of a matrix `[rows, columns]` in CPU memory.

    Make it with `PackedShaped.of`. `index` is uint8 ``[rows, groups, bytes]`` in the order of the
    disk, `scale` float16 ``[rows, groups, fields]``, scales and behind them minima; both are
    contiguous.
    """

    index: Tensor
    scale: Tensor
    rows: int
    groups: int
    columns: int
    grid: str
    bits: int
    # Computed once, as in `kernels.packed.Packed`.
    group_columns: int
    weights: int
    index_pointer: int
    scale_pointer: int

    @staticmethod
    def of(index: Tensor, scale: Tensor, columns: int, grid: str, bits: int) -> PackedShaped:
        """Check that `index` and `scale` fit together and describe rows of `columns` columns.

        Raises:
            ValueError: there is no such grid, or device, dtype, layout or shape is not what the
                kernels read.
        """
        index, scale = index.detach(), scale.detach()
        _check_shapes(tuple(index.shape), tuple(scale.shape), columns, grid, bits)
        for name, tensor, dtype in (("index", index, torch.uint8), ("scale", scale, torch.float16)):
            if tensor.dtype is not dtype:
                raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")
            if not tensor.is_cpu or not tensor.is_contiguous():
                raise ValueError(
                    f"{name} must be contiguous in CPU memory, got strides {tensor.stride()} on "
                    f"{tensor.device}"
                )
        rows, groups = scale.shape[:2]
        return PackedShaped(
            *(index, scale, rows, groups, columns, grid, bits),
            group_columns=columns // groups,
            weights=rows * columns,
            index_pointer=index.data_ptr(),
            scale_pointer=scale.data_ptr(),
        )

    def kernel(self, name: str | None = None) -> object:
        """The kernel of products, of the signature `dispatch.Multiply`; see `chosen_kernel`."""
        return chosen_kernel(self.grid, self.bits, self.group_columns, name)


def _check_shapes(
    index: tuple[int, ...], scale: tuple[int, ...], columns: int, grid: str, bits: int
) -> None:
    fields = 1 + GRIDS[key_of(grid, bits)].has_minimum
    if len(index) != 3 or len(scale) != 3 or index[:2] != scale[:2] or scale[2] != fields:
        raise ValueError(f"index {index} and scale {scale} do not fit together for {grid!r}")
    rows, groups = index[:2]
    if rows < 1 or groups < 1:
        raise ValueError(f"a sketched matrix has at least one row and one group, got {index}")
    if columns < 1 or columns % (groups * BLOCK):
        raise ValueError(
            f"groups have a multiple of {BLOCK} columns, got {groups} in {columns} columns"
        )
    size = packed_size(columns // groups, bits)
    if index[2] != size:
        raise ValueError(
            f"{columns // groups} columns of {bits} bits take {size} bytes per group, "
            f"index has {index[2]}"
        )


def multiply(matrix: PackedShaped, x: Tensor, kernel: str | None = None) -> Tensor:
    """`x @ W.T` for few tokens, by a kernel that reads codes and scales only; no gradients.

    One token with 4096 x 4096 weights took a fifth to a tenth of the time of decoded tiles (one
    thread), eight tokens half.

    Args:
        matrix: the sketch, `[rows, columns]`.
        x: float32, bfloat16 or float16 ``[..., columns]`` in CPU memory.
        kernel: name of the kernels to use (`dispatch.choose`); None takes the fastest.

    Returns:
        ``[..., rows]`` in the dtype of `x`. Sums are float32, the same at any number of threads;
        each token has the result that it has alone.

    Raises:
        ValueError: `x` has another width, dtype or device; `kernel` is unknown or cannot run here.
    """
    dtype = x.dtype
    if x.shape[-1] != matrix.columns:
        raise ValueError(f"x has {x.shape[-1]} columns, the matrix {matrix.columns}")
    if dtype is torch.float16:
        return multiply(matrix, x.float(), kernel).half()
    if (dtype is not torch.float32 and dtype is not torch.bfloat16) or not x.is_cpu:
        raise ValueError(f"x must be float in CPU memory, got {dtype} on {x.device}")
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], matrix.rows)
    args = (
        matrix.index_pointer,
        matrix.scale_pointer,
        x.data_ptr(),
        y.data_ptr(),
        1 if dtype is torch.bfloat16 else 0,
        x.numel() // matrix.columns,
        matrix.rows,
        matrix.groups,
        matrix.group_columns,
    )
    form = (matrix.grid, matrix.bits, matrix.group_columns, kernel)
    if matrix.weights < PARALLEL_WEIGHTS:
        _entry(*form)(0, matrix.rows, *args)
    else:
        share(chosen_kernel(*form), matrix.rows, args, torch.get_num_threads())
    return y


@cache
def _entry(grid: str, bits: int, columns: int, name: str | None) -> Callable[..., None]:
    return entry_of(chosen_kernel(grid, bits, columns, name), 2 + MULTIPLY_ARGS)
