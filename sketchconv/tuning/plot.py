"""The loss curve of a tuning as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sketchconv.errors import EvaluationError, TuningError
from sketchconv.evaluation.plot import check_plot
from sketchconv.tuning.options import TuneStep

_SVG_SEED = "sketchconv"
_FINE = 200  # steps up to which each is marked


def check_curve_file(path: Path) -> None:
    """Refuse early what `save_curve` could not write.

    Raises:
        TuningError: another suffix than .png or .svg, no such folder, or no matplotlib.
    """
    try:
        check_plot(path)
    except EvaluationError as error:
        raise TuningError(str(error)) from None


def save_curve(curve: Sequence[TuneStep], path: Path) -> None:
    """Write the loss of each step, and that of the held-out samples, over the steps.

    The same events give the same bytes.

    Raises:
        TuningError: as `check_curve_file`.
    """
    check_curve_file(path)
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": _SVG_SEED}):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        FigureCanvasAgg(figure)
        axes: Any = figure.subplots()
        _draw(axes, curve)
        kind = path.suffix.lower().removeprefix(".")
        empty = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(path, format=kind, dpi=150, metadata=empty)


def _draw(axes: Any, curve: Sequence[TuneStep]) -> None:
    steps = [(event.step, event.loss) for event in curve if event.loss is not None]
    checks = [(event.step, event.eval_loss) for event in curve if event.eval_loss is not None]
    if steps:
        mark = "." if len(steps) <= _FINE else ""
        axes.plot(*zip(*steps, strict=True), marker=mark, color="0.6", label="step")
    if checks:
        axes.plot(*zip(*checks, strict=True), marker="o", color="C0", label="held out")
    axes.set_xlabel("step (0: the base)")
    axes.set_ylabel("loss, nats per token")
    axes.legend()
