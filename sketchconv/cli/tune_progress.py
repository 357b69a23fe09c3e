"""A tuning on stderr: bar, losses and their curve on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sketchconv.tuning.options import ProgressCallback, TuneStep

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 40
_LINE_EVERY_SECONDS = 5.0


@contextmanager
def show_tuning(*, quiet: bool) -> Iterator[ProgressCallback | None]:
    """A callback for `tune` that draws until the block ends."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _live() as callback:
            yield callback
    else:
        yield _Lines()


def curve_text(losses: Sequence[float], width: int = _WIDTH) -> str:
    """Losses as a row of block characters, means of equal parts where there are many."""
    if not losses:
        return ""
    parts = min(width, len(losses))
    edges = [n * len(losses) // parts for n in range(parts + 1)]
    means = [sum(losses[begin:end]) / (end - begin) for begin, end in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


@contextmanager
def _live() -> Iterator[ProgressCallback]:
    from rich import progress as rp
    from rich.console import Console

    columns = (
        rp.TextColumn("step {task.completed}/{task.total}"),
        rp.BarColumn(bar_width=20),
        rp.TextColumn("{task.fields[losses]}"),
        rp.TimeRemainingColumn(),
    )
    losses: list[float] = []
    measured: list[float] = []
    with rp.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("tuning", total=None, losses="measuring the base")

        def update(event: TuneStep) -> None:
            if event.loss is not None:
                losses.append(event.loss)
            if event.eval_loss is not None:
                measured.append(event.eval_loss)
            text = _text(losses, measured)
            total = event.steps or None
            bar.update(task, total=total, completed=event.step, losses=text)

        yield update


def _text(losses: Sequence[float], measured: Sequence[float]) -> str:
    text = f"loss {losses[-1]:.4f} {curve_text(losses)}" if losses else ""
    if measured:
        text += f" held out {measured[0]:.4f} to {measured[-1]:.4f}"
    return text.strip()


class _Lines:
    """A line every few seconds, and one for each measurement: for logs."""

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, event: TuneStep) -> None:
        """Print a line when one is due."""
        if event.loss is not None:
            if event.seconds - self._last < _LINE_EVERY_SECONDS:
                return
            self._last = event.seconds
        what = "loss" if event.loss is not None else "held-out loss"
        value: Any = event.loss if event.loss is not None else event.eval_loss
        steps = f"/{event.steps}" if event.steps else ""
        sys.stderr.write(f"step {event.step}{steps}  {what} {value:.4f}  {event.seconds:.0f} s\n")
        sys.stderr.flush()
