"""Products with sketched matrices on the CPU: `y = x @ W.T` without ever holding W.

Up to `FEW_TOKENS` activations go row by row through the look-up kernels. More of them go through
tiles of `TILE_BYTES` of decoded rows and torch's matrix product: one small buffer, never all of W.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sketchconv.kernels.atomics import entry_of
from sketchconv.kernels.crew import MULTIPLY_ARGS, share
from sketchconv.kernels.dequantize import decode_into
from sketchconv.kernels.dispatch import Multiply, choose
from sketchconv.kernels.packed import Packed

FEW_TOKENS = 8
TILE_BYTES = 1 << 22
LEAST_ROWS = 64
PARALLEL_WEIGHTS = 1 << 22  # below, waking a thread costs more than it saves


@cache
def _fast_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AVX512-BF16 or AMX)."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and bool(
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        )
    except (AttributeError, RuntimeError):
        return False


def multiply(matrix: Packed, x: Tensor, kernel: str | None = None) -> Tensor:
    """`x @ W.T` for a sketched `W`, without gradients.

    Args:
        matrix: the sketch, `[rows, columns]`.
        x: float32, bfloat16 or float16 ``[..., columns]`` in CPU memory.
        kernel: name of the kernels to use (`dispatch.choose`); None takes the fastest.

    Returns:
        ``[..., rows]`` in the dtype of `x`. Sums are float32 (bfloat16 tiles: as torch does them).
        The result is the same at any number of threads; up to `FEW_TOKENS` rows of `x` each has the
        result that it has alone.

    Raises:
        ValueError: `x` has another width, dtype or device; `kernel` is unknown, cannot run here
            or does not read the matrix's order.
    """
    shape, dtype = x.shape, x.dtype
    if shape[-1] != matrix.columns:
        raise ValueError(f"x has {shape[-1]} columns, the matrix {matrix.columns}")
    tokens = x.numel() // matrix.columns
    if tokens > FEW_TOKENS:
        return _multiply_tiles(matrix, x, kernel)
    if dtype is torch.float16:
        return multiply(matrix, x.float(), kernel).half()
    if (dtype is not torch.float32 and dtype is not torch.bfloat16) or not x.is_cpu:
        raise ValueError(f"x must be float in CPU memory, got {dtype} on {x.device}")
    # Half the time of `torch.empty` with a shape in a tuple, a dtype and a device: 1.1 us of 2.2.
    y = x.new_empty(*shape[:-1], matrix.rows)
    _multiply_few(matrix, x.contiguous(), y, tokens, kernel)
    return y


def _multiply_few(matrix: Packed, x: Tensor, y: Tensor, tokens: int, kernel: str | None) -> None:
    args = (
        matrix.index_pointer,
        matrix.lut_pointer,
        x.data_ptr(),
        y.data_ptr(),
        1 if x.dtype is torch.bfloat16 else 0,
        tokens,
        matrix.rows,
        matrix.groups,
        matrix.group_columns,
    )
    form = (kernel, matrix.bits, matrix.lut_dtype, matrix.order)
    if matrix.weights < PARALLEL_WEIGHTS:
        _entry(*form)(0, matrix.rows, *args)
    else:
        share(_kernel(*form), matrix.rows, args, torch.get_num_threads())


@cache
def _kernel(name: str | None, bits: int, lut: str, order: str) -> Multiply:
    return choose(name).multiply(bits, lut, order)


@cache
def _entry(name: str | None, bits: int, lut: str, order: str) -> Callable[..., None]:
    run: Any = _kernel(name, bits, lut, order)
    return entry_of(run, 2 + MULTIPLY_ARGS)


def _multiply_tiles(matrix: Packed, x: Tensor, kernel: str | None) -> Tensor:
    y = x.new_empty((*x.shape[:-1], matrix.rows))
    for tile, begin, end, given in tiles(matrix, x.detach()):
        decode_into(matrix, tile, begin, kernel)
        y[..., begin:end] = torch.nn.functional.linear(given, tile)
    return y


def tiles(matrix: Packed, x: Tensor) -> Iterator[tuple[Tensor, int, int, Tensor]]:
    """Room for a tile of rows, its first row and the one after its last, and `x` as it is taken.

    That is bfloat16 where the CPU multiplies it in hardware, else float32. All tiles are in one
    place: use one before taking the next.
    """
    if x.dtype is not torch.bfloat16 or not _fast_bf16():
        x = x.float()
    step = min(max(TILE_BYTES // (matrix.columns * x.element_size()), LEAST_ROWS), matrix.rows)
    tile = _scratch(step * matrix.columns, x.dtype).view(step, matrix.columns)
    for begin in range(0, matrix.rows, step):
        end = min(begin + step, matrix.rows)
        yield tile[: end - begin], begin, end, x


class _Local(threading.local):
    """The tile of each thread."""

    tile: Tensor | None = None


_local = _Local()


def _scratch(count: int, dtype: torch.dtype) -> Tensor:
    """Memory for a tile of `count` weights. The pages stay with the thread: new ones at each call
    took as long as the decoding."""
    size = count * dtype.itemsize
    tile = _local.tile
    if tile is None or tile.numel() < size:
        _local.tile = tile = torch.empty(size, dtype=torch.uint8, device="cpu")
    return tile[:size].view(dtype)
