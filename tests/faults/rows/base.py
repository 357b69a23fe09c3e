"""What a row of the scorecard is given, and what it gives back."""

from __future__ import annotations

import random
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

Size = Literal["test", "short", "full"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Setting:
    """How much to try, from which seed, where files may be written, and until when.

    Args:
        until: of `time.monotonic`; rows with many cases leave the rest out then, and say so.
        jobs: that are killed and starved; by default those of the size.
    """

    size: Size
    seed: int
    folder: Path
    until: float = float("inf")
    jobs: tuple[str, ...] = ()

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

    def until(self, setting: Setting, cases: Iterable[T], least: int = 0) -> Iterator[T]:
        """The cases, as long as there is time, and `least` anyhow; notes how many were left out."""
        rest = iter(cases)
        for number, case in enumerate(rest):
            if number >= least and time.monotonic() > setting.until:
                self.notes.append(f"{1 + sum(1 for _ in rest)} cases left out: no time")
                return
            yield case

    def outcome(self) -> Outcome:
        """As a value."""
        return Outcome(self.good, self.cases, tuple(self.failures), tuple(self.notes))


def in_turn(*lists: Iterable[T]) -> Iterator[T]:
    """The first of each, then the second of each, and so on."""
    queues = [iter(items) for items in lists]
    while queues:
        left = []
        for queue in queues:
            for item in queue:
                yield item
                left.append(queue)
                break
        queues = left
