"""One answer under way: what it needs, and the events that it sends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sketchconv.serving.problems import Problem
from sketchconv.serving.text import Pieces
from sketchconv.serving.wanted import Sampling


@dataclass(frozen=True, slots=True)
class Event:
    """A step of an answer.

    Attributes:
        text: new text, perhaps none.
        finish: "stop" or "length" at the end, else None.
        tokens: tokens of the answer so far, that of the end included.
        problem: why there is no more, where something failed.
    """

    text: str = ""
    finish: str | None = None
    tokens: int = 0
    problem: Problem | None = None


@dataclass(slots=True)
class Job:
    """A request in the engine.

    Attributes:
        prompt: its tokens.
        adapter: name of the adapter, or of the base.
        sampling: with a `max_tokens`.
        pieces: turns its tokens into text.
        random: its random numbers.
        send: takes the events; called in the engine's thread.
        cancelled: set by whoever does not want the answer any more.
        tokens: how many there are.
        last: the newest.
        done: whether the end was sent.
    """

    prompt: tuple[int, ...]
    adapter: str
    sampling: Sampling
    pieces: Pieces
    random: torch.Generator
    send: Callable[[Event], None]
    cancelled: bool = False
    tokens: int = 0
    last: int = 0
    done: bool = False

    def take(self, token: int, ends: frozenset[int]) -> None:
        """One more token: send its text, and the end if this is it."""
        self.tokens, self.last = self.tokens + 1, token
        text = "" if token in ends else self.pieces.add(token)
        if token in ends or self.pieces.stopped:
            self._finish(text, "stop")
        elif self.tokens >= int(self.sampling.max_tokens or 1):
            self._finish(text, "length")
        elif text:
            self.send(Event(text, tokens=self.tokens))

    def _finish(self, text: str, why: str) -> None:
        if not self.pieces.stopped:
            text += self.pieces.rest()
        self.done = True
        self.send(Event(text, "stop" if self.pieces.stopped else why, self.tokens))

    def fail(self, problem: Problem) -> None:
        """There will be no more."""
        if not self.done:
            self.done = True
            self.send(Event(problem=problem, tokens=self.tokens))


def live(jobs: list[Job]) -> list[int]:
    """Numbers of the jobs that go on."""
    return [number for number, job in enumerate(jobs) if not (job.done or job.cancelled)]
