"""The levels of a sub-block in units of its step: whole numbers, or a fixed codebook."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


class Levels(Protocol):
    """What a search asks of levels; `o` are the operations (`lanes.Lanes`, `arrays.Arrays`)."""

    @property
    def low(self) -> float:
        """The lowest level."""

    @property
    def high(self) -> float:
        """The highest level."""

    def nearest(self, o: Any, value: Any) -> Any:
        """The level nearest to each value."""

    def code(self, o: Any, level: Any) -> Any:
        """The code of each level."""


@dataclass(frozen=True, slots=True)
class Whole:
    """The whole numbers from `low` to `high`; the code of the lowest is 0, unless it is signed."""

    low: float
    high: float
    signed: bool = False

    def nearest(self, o: Any, value: Any) -> Any:
        """The level nearest to each value, ties to even."""
        return o.nearest(value, self.low, self.high)

    def code(self, o: Any, level: Any) -> Any:
        """The code of each level."""
        return level if self.signed else level - self.low


@dataclass(frozen=True, slots=True)
class Codebook:
    """Any ascending levels; the code is the place."""

    values: tuple[float, ...]

    @property
    def low(self) -> float:
        """The lowest level."""
        return self.values[0]

    @property
    def high(self) -> float:
        """The highest level."""
        return self.values[-1]

    def nearest(self, o: Any, value: Any) -> Any:
        """The level nearest to each value, of two the lower.

        One comparison and one sum for each level: look-ups would need instructions that not every
        machine has.
        """
        found, zero = o.constant(self.values[0]), o.constant(0.0)
        for low, high in zip(self.values, self.values[1:], strict=False):
            found = found + o.select(value > (low + high) / 2, o.constant(high - low), zero)
        return found

    def code(self, o: Any, level: Any) -> Any:
        """The code of each level."""
        found, one, zero = o.constant(0.0), o.constant(1.0), o.constant(0.0)
        for value in self.values[:-1]:
            found = found + o.select(level > value, one, zero)
        return found
