"""The operations of a search in NumPy: the plain reference of `lanes.Lanes`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sketchconv.kernels.ggml.kinds import HALF_MAX

F32 = NDArray[np.float32]
TINY = np.float32(1e-20)
LEAST = np.float32(2.0**-24)


class Arrays:
    """The operations of a search on float32 ``[sub-blocks]`` arrays; see `lanes.Lanes`.

    Args:
        x: float32 ``[size, sub-blocks]``.
        weights: float32 of the same shape.
        group: neighbouring sub-blocks that share a super-block scale; a power of two.
    """

    def __init__(self, x: F32, weights: F32, group: int) -> None:
        self._x, self._weights, self._group = x, weights, group
        self.size = x.shape[0]

    def x(self, i: int) -> F32:
        """Element i of every sub-block."""
        row: F32 = self._x[i]
        return row

    def weight(self, i: int) -> F32:
        """Its weight."""
        row: F32 = self._weights[i]
        return row

    def constant(self, value: float) -> F32:
        """A float32 for every sub-block."""
        return np.full(self._x.shape[1], value, np.float32)

    def select(self, mask: NDArray[np.bool_], yes: F32, no: F32) -> F32:
        """`yes` where the mask holds, else `no`."""
        chosen: F32 = np.where(mask, yes, no)
        return chosen

    def least(self, a: F32, b: F32) -> F32:
        """The smaller of each pair."""
        smaller: F32 = np.where(a < b, a, b)
        return smaller

    def most(self, a: F32, b: F32) -> F32:
        """The larger of each pair."""
        larger: F32 = np.where(a > b, a, b)
        return larger

    def magnitude(self, a: F32) -> F32:
        """Absolute values."""
        return np.abs(a)

    def nearest(self, a: F32, low: float, high: float) -> F32:
        """The nearest whole number from `low` to `high`, ties to even."""
        return np.rint(np.clip(a, np.float32(low), np.float32(high)))

    def reciprocal(self, a: F32) -> F32:
        """`1 / a`, and 0 where `a` is next to nothing."""
        some = np.abs(a) > TINY
        return np.where(some, np.float32(1) / np.where(some, a, np.float32(1)), np.float32(0))

    def root(self, a: F32) -> F32:
        """Square roots."""
        return np.sqrt(a)

    def half(self, a: F32) -> F32:
        """Rounded to a finite float16, ties to even."""
        rounded = np.clip(a, -HALF_MAX, HALF_MAX).astype(np.float16).astype(np.float32)
        return rounded + np.float32(0)  # no negative zero

    def unit(self, a: F32) -> F32:
        """Rounded to a float16 that is not zero, unless `a` is next to nothing."""
        least = np.where(np.abs(a) > TINY, np.copysign(LEAST, a), np.float32(0))
        return np.where(np.abs(a) < LEAST, least, self.half(a))

    def _butterfly(self, a: F32, join: Callable[[F32, F32], F32]) -> F32:
        places, stride = np.arange(a.size), 1
        while stride < self._group:
            a = join(a, a[places ^ stride])
            stride *= 2
        return a

    def group_sum(self, a: F32) -> F32:
        """Sum over the sub-blocks of a super-block, in each of them."""
        return self._butterfly(a, lambda one, two: one + two)

    def group_most(self, a: F32) -> F32:
        """Largest value in the super-block, in each of its sub-blocks."""
        return self._butterfly(a, self.most)

    def group_peak(self, a: F32) -> F32:
        """The value of the largest magnitude in the super-block."""
        high, low = self.group_most(a), self.group_most(-a)
        return np.where(high < low, -low, high)

    def table(self, values: Sequence[float], i: int) -> F32:
        """Entry i of a list of constants."""
        return self.constant(values[i])

    def index(self, i: int) -> int:
        """A fixed place in memory."""
        return i

    def memory(self, count: int) -> list[F32]:
        """Room for `count` arrays."""
        return [self.constant(0.0)] * count

    def put(self, memory: list[F32], i: int, a: F32) -> None:
        """Keep array i."""
        memory[i] = a

    def get(self, memory: list[F32], i: int) -> F32:
        """Array i again."""
        return memory[i]

    def fold(self, count: int, start: Sequence[F32], body: Callable[..., Any]) -> Any:
        """``for i in range(count): state = body(i, *state)``; the last state."""
        state = tuple(start)
        for i in range(count):
            state = tuple(body(i, *state))
        return state
