"""Contenders that each live in a process of their own, and take turns.

The parent starts every contender, waits until all are ready, and then asks one after the other for
one result per round; the others wait on their standard input meanwhile. Results come back through
a file each, never through a pipe: text that libraries print cannot mix with them, and nobody waits
for a reader while the clock runs.

A benchmark asks `child_name()` first: in a child it names the contender, whose `prepare`
gives the function to measure, or raises `Unavailable` with the reason why it cannot take part.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.02
CHILD, RESULTS = "SKETCHCONV_BENCH_CHILD", "SKETCHCONV_BENCH_RESULTS"
Result = dict[str, float]


class Unavailable(Exception):
    """This contender cannot take part here; the message says why."""


def child_name() -> str | None:
    """The contender that this process is; None in the parent."""
    return os.environ.get(CHILD)


def serve(prepare: Callable[[], Callable[[], Result]]) -> None:
    """In a child: prepare, then measure once per line on standard input."""
    with Path(os.environ[RESULTS]).open("a") as results:

        def tell(**answer: Any) -> None:
            results.write(json.dumps(answer) + "\n")
            results.flush()

        try:
            measure = prepare()
        except Unavailable as reason:
            tell(unavailable=str(reason))
            return
        tell(ready=True)
        for _ in sys.stdin:
            tell(result=measure())


@dataclass
class Contender:
    """A child process and the results that it gave."""

    name: str
    process: subprocess.Popen[str]
    folder: Path
    answers: int = 0
    results: list[Result] = field(default_factory=list)

    def wait(self) -> dict[str, Any]:
        """The next answer of the child; a child that ends without one is unavailable."""
        while True:
            lines = (self.folder / "results").read_text().splitlines(keepends=True)
            if len(lines) > self.answers and lines[self.answers].endswith("\n"):
                self.answers += 1
                return dict(json.loads(lines[self.answers - 1]))
            if self.process.poll() is not None:
                return {"unavailable": f"its process ended: {self._last_words()}"}
            time.sleep(POLL_SECONDS)

    def _last_words(self) -> str:
        lines = (self.folder / "log").read_text(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else f"exit code {self.process.returncode}"

    def turn(self) -> None:
        """Ask for one result.

        Raises:
            RuntimeError: the child died.
        """
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        answer = self.wait()
        if "result" not in answer:
            raise RuntimeError(f"{self.name}: {answer['unavailable']}")
        self.results.append(answer["result"])

    def median(self, key: str) -> float:
        """Median of one number over the rounds."""
        return statistics.median(result[key] for result in self.results)


@contextmanager
def contest(
    names: Sequence[str], arguments: Sequence[str], environment: Callable[[str], dict[str, str]]
) -> Iterator[list[Contender]]:
    """Start all contenders of this script; gives those that are ready, and prints why others not.

    One is started after the other, so that none loads while another warms up.

    Args:
        names: what `child_name` shall give in each child.
        arguments: the command line of all children.
        environment: variables to set for a contender, by its name.
    """
    with tempfile.TemporaryDirectory(prefix="sketchconv-bench-") as folder:
        contenders: list[Contender] = []
        try:
            for name in names:
                started = _start(name, Path(folder) / name, arguments, environment(name))
                contenders.append(started)
                answer = started.wait()
                if "unavailable" in answer:
                    print(f"skipped {name}: {answer['unavailable']}", flush=True)
                    contenders.pop()
                    started.process.wait()
            yield contenders
        finally:
            for contender in contenders:
                contender.process.kill()
                contender.process.wait()


def _start(
    name: str, folder: Path, arguments: Sequence[str], environment: dict[str, str]
) -> Contender:
    folder.mkdir()
    (folder / "results").touch()
    own = {CHILD: name, RESULTS: str(folder / "results")}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", sys.argv[0], *arguments],
            env=os.environ | environment | own,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )
    return Contender(name, process, folder)


def compete(contenders: Sequence[Contender], rounds: int) -> None:
    """Let all take one turn per round."""
    for _ in range(rounds):
        for contender in contenders:
            contender.turn()
