"""Standing threads that help with a token while its caller waits in compiled code."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Lock, Thread

Job = Callable[[], object]


class Helper:
    """A thread that runs one job after the other; it ends with the process."""

    def __init__(self, number: int) -> None:
        self.jobs: SimpleQueue[Job] = SimpleQueue()
        name = f"sketchconv-decoder-{number}"
        Thread(target=self._work, name=name, daemon=True).start()

    def _work(self) -> None:
        while True:
            self.jobs.get()()


class Crew:
    """The helpers of this process. One token at a time has them; others do without."""

    def __init__(self) -> None:
        self.lock = Lock()
        self._helpers: list[Helper] = []

    def call(self, jobs: Sequence[Job]) -> None:
        """Start each job on a helper of its own; whoever calls holds `lock`."""
        while len(self._helpers) < len(jobs):
            self._helpers.append(Helper(len(self._helpers) + 1))
        for helper, job in zip(self._helpers, jobs, strict=False):
            helper.jobs.put(job)


_crew = Crew()


def crew() -> Crew:
    """The crew of this process: made before any thread asks, so that there is only one."""
    return _crew


def _after_fork() -> None:
    """A fork has no threads but its own."""
    global _crew
    _crew = Crew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
