"""What a row of the scorecard is given, and what it gives back."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

Size = Literal["test", "short", "full"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Setting:
    """How much to try, from which seed, and where files may be written."""

    size: Size
    seed: int
    folder: Path

    def pick(self, test: T, short: T, full: T) -> T:
        """The value for this size."""
        return {"test": test, "short": short, "full": full}[self.size]

    def rng(self, key: str) -> random.Random:
        """Random numbers of one row: the same whatever other rows ran before."""
        return random.Random(self.seed * 1_000_003 + zlib.crc32(key.encode()))

    def room(self, name: str) -> Path:
        """A new empty folder."""
        path = self.folder / name
        path.mkdir(parents=True)
        return path


@dataclass(frozen=True, slots=True)
class Outcome:
    """How many of the cases went well, and how to repeat the others."""

    good: int
    cases: int
    failures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """A row: its number in the scorecard, what it counts, the target in words."""

    key: str
    title: str
    target: str
    run: Callable[[Setting], Outcome]


@dataclass
class Count:
    """Counts cases while they run."""

    good: int = 0
    cases: int = 0
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, problem: str | None) -> None:
        """Count a case: None went well, a text says what did not and how to repeat it."""
        self.cases += 1
        if problem is None:
            self.good += 1
        else:
            self.failures.append(problem)

    def outcome(self) -> Outcome:
        """As a value."""
        return Outcome(self.good, self.cases, tuple(self.failures), tuple(self.notes))
