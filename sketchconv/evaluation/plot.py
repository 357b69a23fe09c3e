"""Charts of an evaluation: divergence per model, and errors along the layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sketchconv.errors import EvaluationError

if TYPE_CHECKING:
    from sketchconv.evaluation.evaluate import Evaluation, ModelScore

SUFFIXES = (".png", ".svg")
_SVG_SEED = "sketchconv"
# Beyond it matplotlib cannot scale an axis, and a bar says no more than a word.
_MOST = 1e100


def check_plot(path: Path) -> None:
    """Refuse early what `save_plot` could not write.

    Raises:
        EvaluationError: another suffix than .png or .svg, no such folder, or no matplotlib.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise EvaluationError(f"{path}: plots are written as {' or '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise EvaluationError(f"{path.absolute().parent}: no such folder; create it first")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise EvaluationError(
            "plots need matplotlib, which is not installed: pip install 'sketchconv[plot]'"
        ) from None


def save_plot(evaluation: Evaluation, path: Path) -> None:
    """Write bars per model and text and, with a reference, the errors along the layers.

    Bars show KL to the reference where there is one, perplexity elsewhere; lines on them are two
    standard errors to each side. Infinite bars are left out, with words in their place. The same
    evaluation gives the same bytes.

    Raises:
        EvaluationError: as `check_plot`, or there is nothing to draw.
    """
    check_plot(path)
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = evaluation.models
    if not any(model.texts for model in models):
        raise EvaluationError(f"{path}: nothing to draw; a plot needs a --text")
    layered = [model for model in models if model.layers]
    with rc_context({"svg.hashsalt": _SVG_SEED}):
        figure = Figure(figsize=(6.4 * (2 if layered else 1), 4.8), layout="constrained")
        FigureCanvasAgg(figure)
        panels: Any = figure.subplots(1, 2 if layered else 1, squeeze=False)[0]
        _bars(panels[0], models)
        if layered:
            _lines(panels[1], layered)
        kind = path.suffix.lower().removeprefix(".")
        empty = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(path, format=kind, dpi=150, metadata=empty)


def _bars(axes: Any, models: Sequence[ModelScore]) -> None:
    names = [text.text for text in models[0].texts]
    width = 0.8 / len(names)
    compared = all(text.divergence for model in models for text in model.texts)
    for n, name in enumerate(names):
        places = [m + (n - (len(names) - 1) / 2) * width for m in range(len(models))]
        values, errors = zip(*(_height(model, n, compared) for model in models), strict=True)
        shown = [_finite(value) for value in values]
        lines = [_finite(error) for error in errors]
        axes.bar(places, shown, width, yerr=lines, label=name, capsize=3)
        for place, value in zip(places, values, strict=True):
            if _finite(value) != value:
                axes.text(
                    place, 0, f" {value:.3g}: not drawn", rotation=90, ha="center", va="bottom"
                )
    axes.set_xticks(range(len(models)), _labels(models), rotation=20, ha="right")
    axes.set_ylabel("KL to the reference, nats per token" if compared else "perplexity")
    axes.legend()


def _finite(value: float) -> float:
    """The value, or 0 for one that is infinite or as good as that."""
    return value if abs(value) < _MOST else 0.0


def _height(model: ModelScore, n: int, compared: bool) -> tuple[float, float]:
    """A bar's height, and two standard errors."""
    score = model.texts[n]
    if compared and score.divergence is not None:
        return score.divergence.kl.mean, 2 * (score.divergence.kl.error or 0.0)
    return score.perplexity, 2 * score.perplexity * (score.loss.error or 0.0)


def _lines(axes: Any, models: Sequence[ModelScore]) -> None:
    for model, label in zip(models, _labels(models), strict=True):
        axes.plot(range(len(model.layers or ())), model.layers, marker=".", label=label)
    axes.set_xlabel("hidden state (0: embeddings, last: after the final norm)")
    axes.set_ylabel("relative error")
    axes.set_ylim(bottom=0)
    axes.legend()


def _labels(models: Sequence[ModelScore]) -> list[str]:
    """File names where they differ, whole names elsewhere."""
    short = [Path(model.model).name or model.model for model in models]
    return short if len(set(short)) == len(short) else [model.model for model in models]
