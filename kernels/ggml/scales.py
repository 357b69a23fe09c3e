"""Searches of the types whose levels are `step * level`: Q4_0, Q5_0, Q8_0, Q3_K, Q6_K and IQ4.

For a given step the best level of every weight is the nearest, and for given levels the best step
is a quotient of two sums. So a few starting steps, each followed by that quotient, replace a fine
grid: the starts in `plans.py` come within 0.3 to 1.4 % of the squared error of a fine grid. A
super-block then fixes the unit of its scales, and all the steps found so far, and their
neighbours, are tried again as whole multiples of that unit.
"""

from __future__ import annotations

from typing import Any

from sketchconv.kernels.ggml.choices import FAR, NOISE, better_of, bounds, insert, keep, quotient
from sketchconv.kernels.ggml.plans import ScalePlan

AROUND = (0.0, 1.0, -1.0)  # neighbours of a scale


def sums(o: Any, plan: ScalePlan, step: Any) -> Any:
    """Weighted sums of ``r*r``, ``r*v`` and ``v*v``; v are the levels, r what they leave."""
    inverse, zero = o.reciprocal(step), o.constant(0.0)

    def add(i: Any, rr: Any, rv: Any, vv: Any) -> Any:
        x, w = o.x(i), o.weight(i)
        level = plan.levels.nearest(o, x * inverse)
        rest = x - step * level
        wr, wv = w * rest, w * level
        return rr + wr * rest, rv + wr * level, vv + wv * level

    return o.fold(o.size, (zero, zero, zero), add)


def free_steps(o: Any, plan: ScalePlan) -> tuple[tuple[Any, ...], Any]:
    """The best steps found, ``(error, step, error, step, ...)``, and the weighted sum of squares.

    `plan.kept` steps, the best first; that one was improved once more.
    """
    low, high, mass, squares = bounds(o)
    zero = o.constant(0.0)
    # Of two extremes the positive one: rows of few distinct values then have equal steps.
    largest = o.select(high < zero - low, low, high)
    least = squares * NOISE

    def improve(step: Any) -> tuple[Any, Any]:
        rr, rv, vv = sums(o, plan, step)
        change = quotient(o, rv, vv)
        return o.most(rr - change * rv, least), step + change

    def attempt(i: Any, *found: Any) -> tuple[Any, ...]:
        return insert(o, found, improve(largest * o.table(plan.starts, i)))

    found = o.fold(len(plan.starts), (o.constant(FAR), zero) * plan.kept, attempt)
    if plan.spreads:
        size = o.root(quotient(o, squares, mass))
        size = o.select(largest < 0.0, size, zero - size)
        found = o.fold(
            len(plan.spreads),
            found,
            lambda i, *f: insert(o, f, improve(size * o.table(plan.spreads, i))),
        )
    found = o.fold(plan.rounds, found, lambda _, *f: insert(o, f, improve(f[1])))
    return found, squares


def single(o: Any, plan: ScalePlan) -> tuple[Any, ...]:
    """A float16 step for each sub-block, which is a block of its own: ``(step, step)``.

    The best of those found as they are after rounding, or 0, which a codebook may not have.
    """
    found, squares = free_steps(o, plan)
    best = (squares, o.constant(0.0))
    for k in range(plan.kept):
        step = o.unit(found[2 * k + 1])
        best = better_of(o, (error_of(o, plan, step), step), best)
    return best[1], best[1]


def scaled(o: Any, plan: ScalePlan) -> tuple[Any, ...]:
    """Whole scales and the float16 unit of each super-block: ``(step, scale, unit)``."""
    found, _ = free_steps(o, plan)
    largest, zero, far = o.group_peak(found[1]), o.constant(0.0), o.constant(FAR)
    memory = keep(o, found[1::2])

    def attempt(i: Any, *state: Any) -> tuple[Any, ...]:
        unit = o.unit(largest / o.table(plan.units, i))
        inverse = o.reciprocal(unit)

        def from_memory(k: Any, *held: Any) -> Any:
            scale = o.nearest(o.get(memory, k) * inverse, plan.scale_low, plan.scale_high)
            return _trial(o, plan, unit, scale, held)

        held = o.fold(plan.kept, (far, zero), from_memory)
        state = better_of(o, (o.group_sum(held[0]), held[1], unit), state)
        unit = _refit(o, plan, unit, held[1])
        held = _neighbours(o, plan, unit, held[1])
        return better_of(o, (o.group_sum(held[0]), held[1], unit), state)

    _, scale, unit = o.fold(len(plan.units), (far, zero, zero), attempt)
    return unit * scale, scale, unit


def error_of(o: Any, plan: ScalePlan, step: Any) -> Any:
    """The weighted squared error that a step leaves."""
    inverse = o.reciprocal(step)

    def add(i: Any, total: Any) -> Any:
        x = o.x(i)
        rest = x - step * plan.levels.nearest(o, x * inverse)
        return (total + o.weight(i) * rest * rest,)

    return o.fold(o.size, (o.constant(0.0),), add)[0]


def _trial(o: Any, plan: ScalePlan, unit: Any, scale: Any, held: Any) -> tuple[Any, ...]:
    """The better of what is held, ``(error, scale)``, and this scale."""
    return better_of(o, (error_of(o, plan, unit * scale), scale), held)


def _neighbours(o: Any, plan: ScalePlan, unit: Any, middle: Any) -> tuple[Any, ...]:
    """The best of a scale and those next to it, ``(error, scale)``."""
    low, high = o.constant(plan.scale_low), o.constant(plan.scale_high)

    def move(k: Any, *held: Any) -> Any:
        scale = o.most(o.least(middle + o.table(AROUND, k), high), low)
        return _trial(o, plan, unit, scale, held)

    found: tuple[Any, ...] = o.fold(len(AROUND), (o.constant(FAR), o.constant(0.0)), move)
    return found


def _refit(o: Any, plan: ScalePlan, unit: Any, scale: Any) -> Any:
    """The unit that suits the scales and codes of a super-block best, as float16."""
    _, rv, vv = sums(o, plan, unit * scale)
    change = quotient(o, o.group_sum(scale * rv), o.group_sum(scale * scale * vv))
    return o.unit(unit + change)
