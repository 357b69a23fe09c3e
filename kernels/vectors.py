"""One step of the banded program as explicit vectors of eight lanes.

LLVM leaves loops of eight to scalar code, so the step is written as vector instructions of its
target-independent IR: every machine splits or joins them as its registers allow, and none may fuse
or reorder them, so the results are the same everywhere.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

BAND = 8
FAR = 1e30
TINY = 1e-30

I32 = ir.IntType(32)
I64 = ir.IntType(64)
F32 = ir.FloatType()
F64 = ir.DoubleType()
FLOATS = ir.VectorType(F32, BAND)
DOUBLES = ir.VectorType(F64, BAND)
INTS = ir.VectorType(I32, BAND)


def _splat(builder: Any, scalar: Any, kind: Any) -> Any:
    vector = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
    return builder.shuffle_vector(
        vector, ir.Constant(kind, ir.Undefined), ir.Constant(INTS, [0] * BAND)
    )


def _constant(kind: Any, value: Any) -> Any:
    return ir.Constant(kind, [value] * BAND)


def _slot(builder: Any, data: Any, kind: Any, index: int) -> Any:
    pointer = builder.bitcast(data, kind.as_pointer())
    return builder.gep(pointer, [I64(index)])


def _load(builder: Any, data: Any, kind: Any, index: int) -> Any:
    return builder.load(_slot(builder, data, kind, index), align=4)


def _centre(builder: Any, side: Any, origin: Any, mean: Any) -> tuple[Any, Any, Any]:
    """Moments about `mean` counted from `origin`: small numbers, so float32 carries them."""
    w, s, q = (builder.fsub(a, o) for a, o in zip(side, origin, strict=True))
    shift = builder.fmul(mean, w)
    first = builder.fsub(s, shift)
    second = builder.fsub(q, builder.fmul(mean, builder.fadd(s, first)))
    return tuple(builder.fptrunc(v, FLOATS) for v in (w, first, second))  # type: ignore[return-value]


def _cost(builder: Any, left: tuple[Any, Any, Any], right: tuple[Any, Any, Any]) -> Any:
    """Squared error about the mean of the intervals from one left end to eight right ends."""
    zero = _constant(FLOATS, 0.0)
    w, s, q = (builder.fsub(r, x) for r, x in zip(right, left, strict=True))
    floor = _constant(FLOATS, TINY)
    mass = builder.select(builder.fcmp_ordered(">", w, floor), w, floor)
    cost = builder.fsub(q, builder.fdiv(builder.fmul(s, s), mass))
    cost = builder.select(builder.fcmp_ordered(">", cost, zero), cost, zero)
    backward = builder.fcmp_ordered("<", w, zero)
    return builder.select(backward, _constant(FLOATS, FAR), cost)


def _emit_step(builder: Any, left: Any, right: Any, best: Any, fresh: Any, choice: Any) -> None:
    a = tuple(_load(builder, left, DOUBLES, i) for i in range(3))
    b = tuple(_load(builder, right, DOUBLES, i) for i in range(3))
    middle = I32(BAND // 2)
    starts = [builder.extract_element(v, middle) for v in a]
    ends = [builder.extract_element(v, middle) for v in b]
    w, s = (builder.fsub(e, o) for e, o in zip(ends[:2], starts[:2], strict=True))
    some = builder.fcmp_ordered(">", w, ir.Constant(F64, 0.0))
    safe = builder.select(some, w, ir.Constant(F64, 1.0))
    mean = _splat(builder, builder.fdiv(s, safe), DOUBLES)
    origin = tuple(_splat(builder, o, DOUBLES) for o in starts)
    lefts = _centre(builder, a, origin, mean)
    rights = _centre(builder, b, origin, mean)
    bases = _load(builder, best, FLOATS, 0)
    low, pick = None, _constant(INTS, 0)
    for i in range(BAND):
        one = tuple(_splat(builder, builder.extract_element(v, I32(i)), FLOATS) for v in lefts)
        base = _splat(builder, builder.extract_element(bases, I32(i)), FLOATS)
        total = builder.fadd(base, _cost(builder, one, rights))
        if low is None:
            low = total
            continue
        better = builder.fcmp_ordered("<", total, low)
        low = builder.select(better, total, low)
        pick = builder.select(better, _constant(INTS, i), pick)
    builder.store(low, _slot(builder, fresh, FLOATS, 0), align=4)
    builder.store(pick, _slot(builder, choice, INTS, 0), align=4)


@intrinsic  # type: ignore[untyped-decorator]
def banded_step(
    _typing: Any, left: Any, right: Any, best: Any, fresh: Any, choice: Any
) -> tuple[Any, Any]:
    """``fresh[b] = min_a best[a] + cost(left[a], right[b])`` and the lowest such a in ``choice[b]``.

    `left` and `right` are float64 ``[3, 8]``: prefix sums of mass, first and second moment at the
    candidates of two neighbouring boundaries; `best` and `fresh` float32 ``[8]``, `choice` int32
    ``[8]``, all C-contiguous. Intervals that run backwards cost `FAR`.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = [
            context.make_array(kind)(context, builder, arg).data
            for kind, arg in zip(signature.args, args, strict=True)
        ]
        _emit_step(builder, *data)
        return context.get_dummy_value()

    return types.void(left, right, best, fresh, choice), codegen
