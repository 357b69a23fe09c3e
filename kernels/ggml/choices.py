"""Choices between candidates, lane by lane. A candidate is a tuple that begins with its error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

FAR = 3e38  # the error of no candidate
# Errors below this part of the weighted squares are taken as equal: then the first of several
# exact fits is chosen in every sub-block, and their scales agree.
NOISE = 1e-7
# An element of a weight below this part of the largest does not set the range of a sub-block. With
# 1e-3, mean squares of SmolLM2's down_proj, where few channels are far above all others, gave a
# KL of .099 in Q4_K instead of .064.
DEAD = 1e-6


def quotient(o: Any, top: Any, bottom: Any) -> Any:
    """`top / bottom` where the bottom is positive, else 0."""
    some = bottom > 0.0
    return o.select(some, top / o.select(some, bottom, o.constant(1.0)), o.constant(0.0))


def better_of(o: Any, fresh: Sequence[Any], held: Sequence[Any]) -> tuple[Any, ...]:
    """In each lane the candidate of the smaller error; of equal ones the one that is held."""
    better = fresh[0] < held[0]
    return tuple(o.select(better, new, old) for new, old in zip(fresh, held, strict=True))


def insert(o: Any, ranked: Sequence[Any], fresh: Sequence[Any]) -> tuple[Any, ...]:
    """Put a candidate at its place in a row of them, laid end to end, the best first."""
    width, found = len(fresh), []
    for start in range(0, len(ranked), width):
        place = ranked[start : start + width]
        better = fresh[0] < place[0]
        pairs = list(zip(fresh, place, strict=True))
        found += [o.select(better, new, old) for new, old in pairs]
        fresh = [o.select(better, old, new) for new, old in pairs]
    return tuple(found)


def keep(o: Any, found: Sequence[Any]) -> Any:
    """Put vectors into memory, for a loop that takes one after the other."""
    memory = o.memory(len(found))
    for i, one in enumerate(found):
        o.put(memory, o.index(i), one)
    return memory


def bounds(o: Any) -> tuple[Any, Any, Any, Any]:
    """Smallest and largest element that counts, sum of the weights, weighted sum of squares.

    An outlier in a column that is never used must not widen the range for the others.
    """
    zero, far = o.constant(0.0), o.constant(FAR)
    (largest,) = o.fold(o.size, (zero,), lambda i, best: (o.most(best, o.weight(i)),))
    least = largest * DEAD

    def widen(i: Any, low: Any, high: Any, mass: Any, squares: Any) -> Any:
        x, w = o.x(i), o.weight(i)
        counts = w > least
        low = o.least(low, o.select(counts, x, far))
        high = o.most(high, o.select(counts, x, zero - far))
        return low, high, mass + w, squares + w * x * x

    found: tuple[Any, Any, Any, Any] = o.fold(o.size, (far, zero - far, zero, zero), widen)
    return found
