"""Products on the CPU in which each token has the LUTs of its own task, over one set of indices.

Tasks of few tokens go through the look-up kernels together, tile of rows by tile of rows: what is
read of the indices stays in the caches for the next task. On AVX-512, at 2 to 4 bits, the codes of
a row are taken apart once for up to 4 tasks. Tasks of many tokens share tiles of rows as well, and
multiply decoded matrices as `gemv` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sketchconv.kernels import gemv
from sketchconv.kernels.atomics import address_of, call_span, entry_of
from sketchconv.kernels.crew import share
from sketchconv.kernels.dequantize import decode_into
from sketchconv.kernels.dispatch import choose
from sketchconv.kernels.jit import jit
from sketchconv.kernels.packed import Packed
from sketchconv.kernels.pointers import carray, pointer_to

TILE_ROWS = 64  # a kernel arranges the activations anew at each call: 1 to 2 % of 64 rows' time
RUN_ARGS = 9  # of a kernel, after begin and end
Run: TypeAlias = tuple[Packed, int, int]


@jit
def _by_runs(
    begin: int,
    end: int,
    index: int,
    board: int,
    x: int,
    y: int,
    half: int,
    tokens: int,
    rows: int,
    groups: int,
    columns: int,
) -> None:
    """Tiles of rows, each for one run of tokens after another.

    `board` is the address of the kernel's address, the number of runs and, by run, the kernel's
    arguments; the other arguments are those of `dispatch.Multiply` for all tokens, and not used.
    """
    kernel, runs = carray(pointer_to(board, np.int64), (2,))
    for tile in range(begin, end, TILE_ROWS):
        last = min(tile + TILE_ROWS, end)
        for run in range(runs):
            call_span(kernel, tile, last, board + 8 * (2 + RUN_ARGS * run), 9)


@dataclass(frozen=True, slots=True)
class Mixture:
    """Which token of a batch has which matrix, checked once for all batches of this kind.

    Make it with `Mixture.of`. Making one takes ten times as long as the rest of a call.

    Attributes:
        matrices: the sketches, which differ in their LUTs alone.
        tasks: for each token the number of its matrix.
        kernel: name of the kernels; None takes the fastest.
        order: tokens task by task, where the runs below are of tokens in that order.
        few: runs of at most `gemv.FEW_TOKENS` tokens: matrix, first token, the one after the last.
        many: the other runs.
        at_once: kernel that takes a LUT per token, their addresses, and the address of these.
    """

    matrices: Sequence[Packed]
    tasks: Sequence[int]
    kernel: str | None
    order: Tensor | None
    few: list[Run]
    many: list[Run]
    at_once: tuple[Any, NDArray[np.int64], int] | None

    @staticmethod
    def of(matrices: Sequence[Packed], tasks: Sequence[int], kernel: str | None = None) -> Mixture:
        """Check that the matrices have one index and that each task has a matrix.

        Raises:
            ValueError: they have not.
            IndexError: a task has no matrix.
        """
        _check(matrices, tasks)
        order = sorted(range(len(tasks)), key=tasks.__getitem__)
        ordered = order == list(range(len(order))) or len(set(tasks)) == len(tasks)
        sequence = tasks if ordered else [tasks[token] for token in order]
        runs = list(_runs(matrices, sequence))
        few = [run for run in runs if run[2] - run[1] <= gemv.FEW_TOKENS]
        many = [run for run in runs if run[2] - run[1] > gemv.FEW_TOKENS]
        first = matrices[0]
        run = _at_once(kernel, first.bits, first.lut_dtype, first.order)
        words = np.array([matrices[task].lut_pointer for task in sequence], np.int64)
        at_once = None if run is None or many else (run, words, words.ctypes.data)
        place = None if ordered else torch.tensor(order)
        return Mixture(matrices, tasks, kernel, place, few, many, at_once)

    def multiply(self, x: Tensor) -> Tensor:
        """The products of `x` ``[tokens, columns]``, as `multiply_tasks`."""
        first = self.matrices[0]
        if x.dim() != 2 or x.shape != (len(self.tasks), first.columns):
            expected = (len(self.tasks), first.columns)
            raise ValueError(f"x is {tuple(x.shape)}, expected {expected}: tokens by columns")
        if x.dtype is torch.float16:
            return self.multiply(x.float()).half()
        if (x.dtype is not torch.float32 and x.dtype is not torch.bfloat16) or not x.is_cpu:
            raise ValueError(f"x must be float in CPU memory, got {x.dtype} on {x.device}")
        x = x.contiguous() if self.order is None else x[self.order]
        y = x.new_empty(x.shape[0], first.rows)
        if self.few:
            self._few(x, y)
        if self.many:
            self._many(x.detach(), y)
        if self.order is None:
            return y
        back = torch.empty_like(y)
        back[self.order] = y
        return back

    def _few(self, x: Tensor, y: Tensor) -> None:
        first = self.matrices[0]
        half = 1 if x.dtype is torch.bfloat16 else 0
        shape = (first.rows, first.groups, first.group_columns)
        if self.at_once is not None:
            run, _, tables = self.at_once
            given = (x.data_ptr(), y.data_ptr())
        else:
            board = self._board(x, y, half, shape)
            run, tables, given = _by_runs, board.ctypes.data, (0, 0)
        args = (first.index_pointer, tables, *given, half, x.shape[0], *shape)
        if first.weights < gemv.PARALLEL_WEIGHTS:
            entry_of(run, 2 + RUN_ARGS)(0, first.rows, *args)
        else:
            share(run, first.rows, args, torch.get_num_threads())

    def _board(self, x: Tensor, y: Tensor, half: int, shape: tuple[int, ...]) -> NDArray[np.int64]:
        """What `_by_runs` reads."""
        first = self.matrices[0]
        wide, tall = x.element_size() * first.columns, y.element_size() * first.rows
        form = (self.kernel, first.bits, first.lut_dtype, first.order)
        words = [_address(*form), len(self.few)]
        for matrix, begin, end in self.few:
            words += [matrix.index_pointer, matrix.lut_pointer, x.data_ptr() + begin * wide]
            words += [y.data_ptr() + begin * tall, half, end - begin, *shape]
        return np.array(words, np.int64)

    def _many(self, x: Tensor, y: Tensor) -> None:
        """Tiles of rows, decoded for one task after another."""
        for tile, begin, end, given in gemv.tiles(self.matrices[0], x):
            for matrix, start, stop in self.many:
                decode_into(matrix, tile, begin, self.kernel)
                # The weights from the left: for 16 tokens 130 us where `linear` takes 200.
                y[start:stop, begin:end] = (tile @ given[start:stop].T).T


def multiply_tasks(
    matrices: Sequence[Packed], x: Tensor, tasks: Sequence[int], kernel: str | None = None
) -> Tensor:
    """`x[t] @ W.T` with the LUT of ``matrices[tasks[t]]``, without gradients.

    Args:
        matrices: the sketches, which differ in their LUTs alone.
        x: float32, bfloat16 or float16 ``[tokens, columns]`` in CPU memory.
        tasks: for each token the number of its matrix.
        kernel: name of the kernels to use (`dispatch.choose`); None takes the fastest.

    Returns:
        ``[tokens, rows]`` in the dtype of `x`; rows are those of `gemv.multiply` on the tokens of
        one task alone; of more than `gemv.FEW_TOKENS` tokens of a task to rounding.

    Raises:
        ValueError: the matrices have not the same indices, or `x` or `kernel` does not fit.
        IndexError: a task has no matrix.
    """
    return Mixture.of(matrices, tasks, kernel).multiply(x)


def _check(matrices: Sequence[Packed], tasks: Sequence[int]) -> None:
    first = matrices[0]
    for matrix in matrices[1:]:
        if (
            matrix.index_pointer != first.index_pointer
            or matrix.lut.shape != first.lut.shape
            or matrix.lut_dtype != first.lut_dtype
            or matrix.order != first.order
        ):
            raise ValueError("the matrices of a mixed batch must share one index")
    for task in set(tasks):
        if not 0 <= task < len(matrices):
            raise IndexError(f"task {task} is not among {len(matrices)} matrices")


def _runs(matrices: Sequence[Packed], tasks: Sequence[int]) -> Iterator[Run]:
    """Neighbours of one task."""
    begin = 0
    for task, group in groupby(tasks):
        end = begin + len(list(group))
        yield matrices[task], begin, end
        begin = end


@cache
def _at_once(name: str | None, bits: int, lut: str, order: str) -> Any:
    return choose(name).multiply_tasks(bits, lut, order)


@cache
def _address(name: str | None, bits: int, lut: str, order: str) -> int:
    run: Any = choose(name).multiply(bits, lut, order)
    return address_of(run, 2 + RUN_ARGS)
