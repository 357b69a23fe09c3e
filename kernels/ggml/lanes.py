"""Sixteen sub-blocks side by side in vector registers: the compiled side of the searches.

A search is written once, in terms of the operations below. `Lanes` turns it into LLVM IR in which
lane l belongs to sub-block l; `arrays.Arrays` runs the same text in NumPy. Sums run over the
elements of a sub-block one after the other, so both give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir

from sketchconv.kernels import vectors as v
from sketchconv.kernels.ggml.kinds import HALF_MAX

LANES = 16
FLOATS = v.vector(v.F32, LANES)
WORDS = v.vector(v.I32, LANES)
BYTES = v.vector(v.I8, LANES)
ROUNDER = 1.5 * 2.0**23  # added and taken away, it rounds to an integer, ties to even
TINY = 1e-20  # a step below it is none: the reciprocal would overflow
LEAST_NORMAL = 2.0**-14  # of float16
LEAST = 2.0**-24  # and its smallest positive value


def constant(value: float) -> Any:
    """A float32 in all lanes."""
    return v.constant(FLOATS, float(np.float32(value)))


def transpose(builder: Any, rows: list[Any]) -> list[Any]:
    """Sixteen vectors of sixteen, by exchanging halves, quarters, pairs and neighbours."""
    stride = LANES // 2
    while stride:
        upper = [lane - stride + LANES if lane & stride else lane for lane in range(LANES)]
        lower = [lane + LANES if lane & stride else lane + stride for lane in range(LANES)]
        orders = [ir.Constant(v.vector(v.I32, LANES), order) for order in (upper, lower)]
        for r in range(LANES):
            if not r & stride:
                pair = rows[r], rows[r + stride]
                rows[r], rows[r + stride] = (builder.shuffle_vector(*pair, o) for o in orders)
        stride //= 2
    return rows


@dataclass(frozen=True, slots=True)
class Lane:
    """A vector of 16 values in a function that is being built, with the usual operators."""

    builder: Any
    value: Any

    def _apply(self, name: str, other: Lane | float) -> Lane:
        right = other.value if isinstance(other, Lane) else constant(other)
        return Lane(self.builder, getattr(self.builder, name)(self.value, right))

    def _compare(self, sign: str, other: Lane | float) -> Lane:
        right = other.value if isinstance(other, Lane) else constant(other)
        return Lane(self.builder, self.builder.fcmp_ordered(sign, self.value, right))

    def __add__(self, other: Lane | float) -> Lane:
        return self._apply("fadd", other)

    def __sub__(self, other: Lane | float) -> Lane:
        return self._apply("fsub", other)

    def __mul__(self, other: Lane | float) -> Lane:
        return self._apply("fmul", other)

    def __truediv__(self, other: Lane | float) -> Lane:
        return self._apply("fdiv", other)

    def __lt__(self, other: Lane | float) -> Lane:
        return self._compare("<", other)

    def __gt__(self, other: Lane | float) -> Lane:
        return self._compare(">", other)


class Lanes:
    """The operations of a search, building IR.

    Args:
        builder: where to build.
        x: pointer to float32 ``[size, 16]``, element i of every sub-block in row i.
        weights: pointer to the weights of the same elements.
        size: elements of a sub-block, a number or an int64 that is known when the code runs.
        group: sub-blocks that share a super-block scale; a power of two up to 16.
    """

    def __init__(self, builder: Any, x: Any, weights: Any, size: Any, group: int) -> None:
        self._builder = builder
        self._x, self._weights = x, weights
        self.size, self._group = size, group

    def _lane(self, value: Any) -> Lane:
        return Lane(self._builder, value)

    def _row(self, data: Any, i: Any) -> Lane:
        offset = self._builder.mul(i, v.I64(LANES))
        return self._lane(v.load(self._builder, data, FLOATS, offset))

    def x(self, i: Any) -> Lane:
        """Element i of every sub-block."""
        return self._row(self._x, i)

    def weight(self, i: Any) -> Lane:
        """Its weight."""
        return self._row(self._weights, i)

    def constant(self, value: float) -> Lane:
        """A float32 in all lanes."""
        return self._lane(constant(value))

    def select(self, mask: Lane, yes: Lane, no: Lane) -> Lane:
        """`yes` where the mask holds, else `no`."""
        return self._lane(self._builder.select(mask.value, yes.value, no.value))

    def least(self, a: Lane, b: Lane) -> Lane:
        """The smaller of each pair."""
        return self.select(a < b, a, b)

    def most(self, a: Lane, b: Lane) -> Lane:
        """The larger of each pair."""
        return self.select(a > b, a, b)

    def magnitude(self, a: Lane) -> Lane:
        """Absolute values."""
        word = self._builder.bitcast(a.value, WORDS)
        word = self._builder.and_(word, v.constant(WORDS, 0x7FFFFFFF))
        return self._lane(self._builder.bitcast(word, FLOATS))

    def nearest(self, a: Lane, low: float, high: float) -> Lane:
        """The nearest whole number from `low` to `high`, ties to even."""
        a = self.most(self.least(a, self.constant(high)), self.constant(low))
        return (a + ROUNDER) - ROUNDER

    def reciprocal(self, a: Lane) -> Lane:
        """`1 / a`, and 0 where `a` is next to nothing."""
        some = self.magnitude(a) > TINY
        return self.select(some, self.constant(1.0) / a, self.constant(0.0))

    def root(self, a: Lane) -> Lane:
        """Square roots."""
        kind = ir.FunctionType(FLOATS, [FLOATS])
        function = v.cgutils.get_or_insert_function(self._builder.module, kind, "llvm.sqrt.v16f32")
        return self._lane(self._builder.call(function, [a.value]))

    def half(self, a: Lane) -> Lane:
        """Rounded to a finite float16, ties to even.

        By integers: without F16C LLVM would call a library that is not there.
        """
        b = self._builder
        a = self.most(self.least(a, self.constant(HALF_MAX)), self.constant(-HALF_MAX))
        size = self.magnitude(a)
        word = b.bitcast(size.value, WORDS)
        odd = b.and_(b.lshr(word, v.constant(WORDS, 13)), v.constant(WORDS, 1))
        word = b.add(b.add(word, v.constant(WORDS, 0xFFF)), odd)
        normal = self._lane(b.bitcast(b.and_(word, v.constant(WORDS, ~0x1FFF)), FLOATS))
        # Next to 0.5 a float32 has the steps of a subnormal float16.
        value = self.select(size < LEAST_NORMAL, (size + 0.5) - 0.5, normal)
        return self.select(a < 0.0, self.constant(0.0) - value, value)

    def unit(self, a: Lane) -> Lane:
        """Rounded to a float16 that is not zero, unless `a` is next to nothing."""
        least = self.select(a < 0.0, self.constant(-LEAST), self.constant(LEAST))
        small = self.magnitude(a) < LEAST
        least = self.select(self.magnitude(a) > TINY, least, self.constant(0.0))
        return self.select(small, least, self.half(a))

    def _butterfly(self, a: Lane, join: Callable[[Lane, Lane], Lane]) -> Lane:
        stride = 1
        while stride < self._group:
            order = ir.Constant(v.vector(v.I32, LANES), [i ^ stride for i in range(LANES)])
            swapped = self._builder.shuffle_vector(a.value, a.value, order)
            a = join(a, self._lane(swapped))
            stride *= 2
        return a

    def group_sum(self, a: Lane) -> Lane:
        """Sum over the sub-blocks of a super-block, in each of them."""
        return self._butterfly(a, lambda one, two: one + two)

    def group_most(self, a: Lane) -> Lane:
        """Largest value in the super-block, in each of its sub-blocks."""
        return self._butterfly(a, self.most)

    def group_peak(self, a: Lane) -> Lane:
        """The value of the largest magnitude in the super-block; of two, the positive one."""
        high, low = self.group_most(a), self.group_most(self.constant(0.0) - a)
        return self.select(high < low, self.constant(0.0) - low, high)

    def table(self, values: Sequence[float], i: Any) -> Lane:
        """Entry i of a list of constants, in all lanes."""
        kind = ir.ArrayType(v.F32, len(values))
        data = v.cgutils.global_constant(
            self._builder, "starts", ir.Constant(kind, [float(np.float32(x)) for x in values])
        )
        data = self._builder.bitcast(data, v.F32.as_pointer())
        return self._lane(v.splat(self._builder, v.load(self._builder, data, v.F32, i), LANES))

    def index(self, i: int) -> Any:
        """A fixed place in memory."""
        return v.I64(i)

    def memory(self, count: int) -> Any:
        """Room for `count` vectors."""
        kind = ir.ArrayType(FLOATS, count)
        data = v.cgutils.alloca_once(self._builder, kind)
        return self._builder.bitcast(data, v.F32.as_pointer())

    def put(self, memory: Any, i: Any, a: Lane) -> None:
        """Keep vector i."""
        v.store(self._builder, a.value, memory, self._builder.mul(i, v.I64(LANES)))

    def get(self, memory: Any, i: Any) -> Lane:
        """Vector i again."""
        return self._row(memory, i)

    def fold(
        self, count: Any, start: Sequence[Lane], body: Callable[..., Sequence[Lane]]
    ) -> tuple[Lane, ...]:
        """``for i in range(count): state = body(i, *state)``; the last state."""
        found = v.blocks(
            self._builder,
            v.I64(count) if isinstance(count, int) else count,
            1,
            [lane.value for lane in start],
            lambda i, now: [a.value for a in body(i, *(self._lane(value) for value in now))],
        )
        return tuple(self._lane(value) for value in found)
