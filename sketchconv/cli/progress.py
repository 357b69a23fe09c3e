"""Progress on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sketchconv.pipeline import Progress, ProgressCallback

_LINE_EVERY_SECONDS = 5.0


@contextmanager
def show_progress(*, quiet: bool) -> Iterator[ProgressCallback | None]:
    """A callback for `convert` that draws its progress until the block ends."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar() as callback:
            yield callback
    else:
        yield _Lines()


@contextmanager
def show_bytes(name: str = "verifying") -> Iterator[Callable[[int, int], None] | None]:
    """A callback that draws a bar of bytes; nothing where there is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich import progress as rp
    from rich.console import Console

    columns = (rp.BarColumn(), rp.DownloadColumn(), rp.TransferSpeedColumn())
    with rp.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def _bar() -> Iterator[ProgressCallback]:
    from rich import progress as rp
    from rich.console import Console

    columns = (
        rp.TextColumn("{task.description}"),
        rp.BarColumn(),
        rp.TaskProgressColumn(),
        rp.TextColumn("{task.fields[rate]}"),
        rp.TimeRemainingColumn(),
    )
    started = time.perf_counter()
    with rp.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("reading", total=None, rate="")

        def update(event: Progress) -> None:
            nonlocal started
            if event.done == 0:
                started = time.perf_counter()
            rate = _rate(event, time.perf_counter() - started)
            bar.update(
                task, total=event.total, completed=event.done, description=event.name, rate=rate
            )

        yield update


def silence_transformers() -> None:
    """No bars of transformers' own between ours."""
    from transformers.utils import logging

    disable: Any = logging.disable_progress_bar
    disable()


class _Lines:
    """One line every few seconds, and one at the end: for logs."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._last = 0.0

    def __call__(self, event: Progress) -> None:
        """Print a line when one is due."""
        now = time.perf_counter()
        if event.done == 0:
            self._started = now
        if now - self._last < _LINE_EVERY_SECONDS and event.done < event.total:
            return
        self._last = now
        elapsed = now - self._started
        left = elapsed * (event.total - event.done) / max(1, event.done)
        eta = _clock(left) if event.done else "-:--:--"
        share = 100 * event.done / max(1, event.total)
        sys.stderr.write(f"{share:5.1f} %  {_rate(event, elapsed)}  ETA {eta}  {event.name}\n")
        sys.stderr.flush()


def _rate(event: Progress, seconds: float) -> str:
    if event.action == "recover":
        return f"step {event.done:4d}/{event.total}"
    if event.action == "measure":
        return f"block {event.done:3d}/{event.total}"
    if event.action == "write":
        return f"{event.done / max(seconds, 1e-9):6.0f} tokens/s"
    return f"{event.done / max(seconds, 1e-9) / 1e6:6.1f} M weights/s"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
