"""Searches of the types whose levels are `step * code + base`: Q4_1, Q5_1, Q2_K, Q4_K, Q5_K.

As in `scales.py`, with two unknowns: the best step and base for given codes solve a system of two
equations. The bases of the K types are not above zero: their blocks store `-base` as a positive
scale. Sums are those of what a start leaves, not of the weights, so nothing cancels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sketchconv.kernels.ggml.choices import FAR, NOISE, better_of, bounds, insert, keep, quotient
from sketchconv.kernels.ggml.plans import AffinePlan

# Neighbours of a scale and a fall. A larger step wants a lower base, so (1, -1) is never better.
AROUND = ((0.0, 1.0, -1.0, 1.0, -1.0, 0.0, 0.0), (0.0, 1.0, -1.0, 0.0, 0.0, 1.0, -1.0))
SINGULAR = 1e-6  # a determinant below this part of its first term is rounding


def sums(o: Any, plan: AffinePlan, step: Any, base: Any) -> Any:
    """Weighted sums of ``r*r, r*q, r, q*q, q``; q are the codes, r what they leave."""
    inverse, zero = o.reciprocal(step), o.constant(0.0)

    def add(i: Any, rr: Any, rq: Any, r: Any, qq: Any, q: Any) -> Any:
        above, w = o.x(i) - base, o.weight(i)
        code = o.nearest(above * inverse, 0.0, plan.top)
        rest = above - step * code
        wr, wq = w * rest, w * code
        return rr + wr * rest, rq + wr * code, r + wr, qq + wq * code, q + wq

    return o.fold(o.size, (zero,) * 5, add)


def solve(o: Any, a: Any, b: Any, c: Any, p: Any, q: Any) -> tuple[Any, Any]:
    """``(u, v)`` with `a u + b v = p` and `b u + c v = q`; zeros where that is singular."""
    determinant = a * c - b * b
    fine = determinant > a * c * SINGULAR
    safe = o.select(fine, determinant, o.constant(1.0))
    zero = o.constant(0.0)
    u, v = (c * p - b * q) / safe, (a * q - b * p) / safe
    return o.select(fine, u, zero), o.select(fine, v, zero)


def improve(o: Any, plan: AffinePlan, step: Any, base: Any, mass: Any) -> tuple[Any, Any, Any]:
    """``(error, step, base)`` with the step and base that suit the codes of the given ones best.

    `mass` is the sum of the weights.
    """
    rr, rq, r, qq, q = sums(o, plan, step, base)
    up, lift = solve(o, qq, q, mass, rq, r)
    # Where the system is singular all codes are equal, and the base alone takes the mean.
    lift = o.select(o.magnitude(up) > 0.0, lift, quotient(o, r, mass))
    error = rr - up * rq - lift * r
    better, moved = step + up, base + lift
    if not plan.below:
        return error, better, moved
    above = moved > 0.0
    first = rq + base * q
    only = quotient(o, first, qq)
    rest = rr + base * r * 2.0 + base * base * mass - only * first
    zero = o.constant(0.0)
    return (
        o.select(above, rest, error),
        o.select(above, step + only, better),
        o.select(above, zero, moved),
    )


def free_steps(o: Any, plan: AffinePlan) -> tuple[Any, Any]:
    """The best steps and bases found, ``((error, step, base), ...)``, and the sum of the weights.

    `plan.kept` of them, the best first; that one was improved once more.
    """
    low, high, mass, _ = bounds(o)
    zero = o.constant(0.0)
    low = o.least(low, zero) if plan.below else low
    least = (high - low) * (high - low) * mass * NOISE
    found = (o.constant(FAR), zero, zero) * plan.kept

    def attempt(near: Any, found: Any) -> tuple[Any, ...]:
        error, *better = improve(o, plan, near[0], near[1], mass)
        return insert(o, found, (o.most(error, least), *better))

    for count, start in _starts(o, plan, low, high, mass):
        found = o.fold(count, found, lambda i, *f, start=start: attempt(start(i), f))
    found = o.fold(plan.rounds, found, lambda _, *f: attempt(f[1:3], f))
    return found, mass


def _starts(o: Any, plan: AffinePlan, low: Any, high: Any, mass: Any) -> Iterator[Any]:
    """``(count, start)`` with ``start(i)`` a step and a base: from the range, from the spread."""
    spans = tuple(1 / (plan.top + after - before) for before, after in plan.starts)
    befores = tuple(before for before, _ in plan.starts)

    def from_range(i: Any) -> tuple[Any, Any]:
        step = (high - low) * o.table(spans, i)
        base = low - step * o.table(befores, i)
        return step, o.least(base, o.constant(0.0)) if plan.below else base

    yield len(plan.starts), from_range
    if plan.spreads:
        mean, size = _moments(o, mass)

        def from_spread(i: Any) -> tuple[Any, Any]:
            step = size * o.table(plan.spreads, i)
            return step, mean - step * (plan.top / 2)

        yield len(plan.spreads), from_spread


def _moments(o: Any, mass: Any) -> tuple[Any, Any]:
    """Weighted mean and standard deviation of each sub-block."""
    zero = o.constant(0.0)
    (total,) = o.fold(o.size, (zero,), lambda i, now: (now + o.weight(i) * o.x(i),))
    mean = quotient(o, total, mass)

    def add(i: Any, now: Any) -> Any:
        gap = o.x(i) - mean
        return (now + o.weight(i) * gap * gap,)

    (squares,) = o.fold(o.size, (zero,), add)
    return mean, o.root(quotient(o, squares, mass))


def single(o: Any, plan: AffinePlan) -> tuple[Any, ...]:
    """A float16 step and base for each sub-block: ``(step, base, step, base)``.

    The best of those found as they are after rounding. The base is rounded first: far from zero
    its float16 is coarse, and the step has to fit it.
    """
    found, _ = free_steps(o, plan)
    best = (o.constant(FAR), o.constant(0.0), o.constant(0.0))
    for k in range(plan.kept):
        step, base = found[3 * k + 1], o.half(found[3 * k + 2])
        _, rq, _, qq, _ = sums(o, plan, step, base)
        step = o.unit(step + quotient(o, rq, qq))
        best = better_of(o, (error_of(o, plan, step, base), step, base), best)
    return *best[1:], *best[1:]


def scaled(o: Any, plan: AffinePlan) -> tuple[Any, ...]:
    """Whole scales and float16 units: ``(step, base, scale, fall, step unit, base unit)``.

    `base = -fall * base unit`.
    """
    found, mass = free_steps(o, plan)
    zero, far = o.constant(0.0), o.constant(FAR)
    tallest, deepest = o.group_most(found[1]), o.group_most(zero - found[2])
    memories = keep(o, found[1::3]), keep(o, [zero - base for base in found[2::3]])

    def attempt(i: Any, *state: Any) -> tuple[Any, ...]:
        share = o.table(plan.units, i)
        units = o.unit(tallest / share), o.unit(deepest / share)
        inverses = o.reciprocal(units[0]), o.reciprocal(units[1])

        def from_memory(k: Any, *held: Any) -> Any:
            near = [
                o.nearest(o.get(memory, k) * inverse, 0.0, plan.scale_high)
                for memory, inverse in zip(memories, inverses, strict=True)
            ]
            return _trial(o, plan, units, near, held)

        held = o.fold(plan.kept, (far, zero, zero), from_memory)
        state = _keep(o, held, units, state)
        units = _refit(o, plan, units, held[1:], mass)
        held = _neighbours(o, plan, units, held[1:])
        return _keep(o, held, units, state)

    _, scale, fall, unit, base_unit = o.fold(
        len(plan.units), (far, zero, zero, zero, zero), attempt
    )
    return unit * scale, zero - base_unit * fall, scale, fall, unit, base_unit


def error_of(o: Any, plan: AffinePlan, step: Any, base: Any) -> Any:
    """The weighted squared error that a step and a base leave."""
    inverse = o.reciprocal(step)

    def add(i: Any, total: Any) -> Any:
        above = o.x(i) - base
        rest = above - step * o.nearest(above * inverse, 0.0, plan.top)
        return (total + o.weight(i) * rest * rest,)

    return o.fold(o.size, (o.constant(0.0),), add)[0]


def _trial(o: Any, plan: AffinePlan, units: Any, near: Any, held: Any) -> tuple[Any, ...]:
    """The better of what is held, ``(error, scale, fall)``, and these scales."""
    error = error_of(o, plan, units[0] * near[0], o.constant(0.0) - units[1] * near[1])
    return better_of(o, (error, *near), held)


def _neighbours(o: Any, plan: AffinePlan, units: Any, middle: Any) -> tuple[Any, ...]:
    """The best of some scales and those next to them, ``(error, scale, fall)``."""
    low, high = o.constant(0.0), o.constant(plan.scale_high)

    def move(k: Any, *held: Any) -> Any:
        near = (at + o.table(by, k) for at, by in zip(middle, AROUND, strict=True))
        return _trial(o, plan, units, [o.most(o.least(a, high), low) for a in near], held)

    found: tuple[Any, ...] = o.fold(len(AROUND[0]), (o.constant(FAR), low, low), move)
    return found


def _keep(o: Any, held: Any, units: Any, state: Any) -> tuple[Any, ...]:
    """The better of two choices for a whole super-block."""
    return better_of(o, (o.group_sum(held[0]), *held[1:], *units), state)


def _refit(o: Any, plan: AffinePlan, units: Any, near: Any, mass: Any) -> tuple[Any, Any]:
    """The units that suit the scales and codes of a super-block best, as float16."""
    (scale, fall), zero = near, o.constant(0.0)
    _, rq, r, qq, q = sums(o, plan, units[0] * scale, zero - units[1] * fall)
    up, down = solve(
        o,
        o.group_sum(scale * scale * qq),
        zero - o.group_sum(scale * fall * q),
        o.group_sum(fall * fall * mass),
        o.group_sum(scale * rq),
        zero - o.group_sum(fall * r),
    )
    return o.unit(units[0] + up), o.unit(units[1] + down)
