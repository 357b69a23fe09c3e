"""One step of the banded dynamic program, as vectors of eight lanes.

Written out because LLVM leaves loops of eight to scalar code, three times slower.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from sketchconv.kernels import vectors as v

BAND = 8
FAR = 1e30
TINY = 1e-30

FLOATS = v.vector(v.F32, BAND)
DOUBLES = v.vector(v.F64, BAND)
INTS = v.vector(v.I32, BAND)


def _centre(builder: Any, side: Any, origin: Any, mean: Any) -> list[Any]:
    """Moments about `mean` counted from `origin`: small numbers, so float32 carries them."""
    w, s, q = (builder.fsub(a, o) for a, o in zip(side, origin, strict=True))
    first = builder.fsub(s, builder.fmul(mean, w))
    second = builder.fsub(q, builder.fmul(mean, builder.fadd(s, first)))
    return [builder.fptrunc(x, FLOATS) for x in (w, first, second)]


def _cost(builder: Any, left: list[Any], right: list[Any]) -> Any:
    """Squared error about the mean of the intervals from one left end to eight right ends."""
    zero, floor = v.constant(FLOATS, 0.0), v.constant(FLOATS, TINY)
    w, s, q = (builder.fsub(r, x) for r, x in zip(right, left, strict=True))
    mass = builder.select(builder.fcmp_ordered(">", w, floor), w, floor)
    cost = builder.fsub(q, builder.fdiv(builder.fmul(s, s), mass))
    cost = builder.select(builder.fcmp_ordered(">", cost, zero), cost, zero)
    backward = builder.fcmp_ordered("<", w, zero)
    return builder.select(backward, v.constant(FLOATS, FAR), cost)


def _localise(builder: Any, a: list[Any], b: list[Any]) -> tuple[list[Any], list[Any]]:
    """Both sides' moments, counted from the middle left end, about the mean from there."""
    middle = v.I32(BAND // 2)
    starts, ends = ([builder.extract_element(x, middle) for x in side] for side in (a, b))
    w, s = (builder.fsub(e, o) for e, o in zip(ends[:2], starts[:2], strict=True))
    some = builder.fcmp_ordered(">", w, ir.Constant(v.F64, 0.0))
    safe = builder.select(some, w, ir.Constant(v.F64, 1.0))
    mean = v.splat(builder, builder.fdiv(s, safe), BAND)
    origin = [v.splat(builder, o, BAND) for o in starts]
    return _centre(builder, a, origin, mean), _centre(builder, b, origin, mean)


def _emit(builder: Any, sums: list[Any], spots: Any, side: Any, best: Any, choice: Any) -> None:
    offsets = [v.load(builder, spots, v.I64, v.I64(i)) for i in range(BAND)]
    left = [v.load(builder, side, DOUBLES, v.I64(BAND * i)) for i in range(3)]
    right = [v.gather(builder, data, DOUBLES, offsets) for data in sums]
    for i, values in enumerate(right):
        v.store(builder, values, side, v.I64(BAND * i))
    lefts, rights = _localise(builder, left, right)
    bases = v.load(builder, best, FLOATS, v.I64(0))
    low, pick = None, v.constant(INTS, 0)
    for i in range(BAND):
        one = [v.splat(builder, builder.extract_element(x, v.I32(i)), BAND) for x in lefts]
        base = v.splat(builder, builder.extract_element(bases, v.I32(i)), BAND)
        total = builder.fadd(base, _cost(builder, one, rights))
        if low is None:
            low = total
            continue
        better = builder.fcmp_ordered("<", total, low)
        low = builder.select(better, total, low)
        pick = builder.select(better, v.constant(INTS, i), pick)
    v.store(builder, low, best, v.I64(0))
    v.store(builder, pick, choice, v.I64(0))


@v.intrinsic
def banded_step(
    _typing: Any, p0: Any, p1: Any, p2: Any, spots: Any, side: Any, best: Any, choice: Any
) -> tuple[Any, Any]:
    """``best[b] <- min_a best[a] + cost(a, b)``, and the lowest such a in ``choice[b]``.

    `p0`, `p1`, `p2` are float64 prefix sums of mass, first and second moment; `spots` int64
    ``[8]`` the candidates b of a boundary. `side` float64 ``[3, 8]`` holds the sums at the
    candidates a of the boundary before, and then those of this one; `best` is float32 ``[8]``,
    `choice` int32 ``[8]``, all C-contiguous. Intervals that run backwards cost `FAR`.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        *sums, place, ends, costs, picks = v.data_of(context, builder, signature, args)
        _emit(builder, sums, place, ends, costs, picks)
        return context.get_dummy_value()

    return v.types.void(p0, p1, p2, spots, side, best, choice), codegen
