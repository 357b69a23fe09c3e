"""A chart of an analysis, after the first figure of the paper on sketch fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sketchconv.errors import EvaluationError
from sketchconv.evaluation.plot import check_plot
from sketchconv.projection.analysis import SHARES, Analysis

__all__ = ["check_plot", "save_plot"]

_SVG_SEED = "sketchconv"


def save_plot(analysis: Analysis, path: Path) -> None:
    """Draw the rank that each weight's update needs, and the errors at equal parameter counts.

    Left: rank needed for 80, 90 and 95 % of the update's energy as a share of the full rank, weight
    after weight as the model has them. Right: error of the sketch update and of the low-rank update
    against their parameters, all weights together. The same analysis gives the same bytes.

    Raises:
        EvaluationError: as `check_plot`, or no weight changed.
    """
    check_plot(path)
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not analysis.totals:
        raise EvaluationError(f"{path}: nothing to draw; no weight differs between the models")
    with rc_context({"svg.hashsalt": _SVG_SEED}):
        figure = Figure(figsize=(12.8, 4.8), layout="constrained")
        FigureCanvasAgg(figure)
        panels: Any = figure.subplots(1, 2)
        _ranks(panels[0], analysis)
        _errors(panels[1], analysis)
        kind = path.suffix.lower().removeprefix(".")
        empty = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(path, format=kind, dpi=150, metadata=empty)


def _ranks(axes: Any, analysis: Analysis) -> None:
    changed = [layer for layer in analysis.layers if layer.energy > 0]
    for share in SHARES:
        heights = [100 * layer.ranks[share] / min(layer.shape) for layer in changed]
        axes.plot(range(len(heights)), heights, marker=".", lw=0.8, label=f"{100 * share:.0f} %")
    axes.set_xlabel("weight, in the order of the model")
    axes.set_ylabel("rank needed, % of the full rank")
    axes.set_ylim(0, 100)
    axes.legend(title="energy of the update")


def _errors(axes: Any, analysis: Analysis) -> None:
    totals = analysis.totals
    found = list(totals.values())
    axes.plot([t.parameters for t in found], [t.sketch for t in found], marker="o", label="sketch")
    sizes = [t.low_rank_parameters for t in found]
    axes.plot(sizes, [t.low_rank for t in found], marker="s", label="low rank")
    for label, total in totals.items():
        axes.annotate(label, (total.parameters, total.sketch), textcoords="offset points",
                      xytext=(4, 4))  # fmt: skip
    for total in found:
        axes.annotate(f"r = {total.rank}", (total.low_rank_parameters, total.low_rank),
                      textcoords="offset points", xytext=(4, -12))  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.margins(x=0.15)
    axes.set_xlabel("parameters of the update")
    axes.set_ylabel("error left, $|D - update|^2 / |D|^2$")
    axes.set_ylim(0, 1)
    axes.legend()
