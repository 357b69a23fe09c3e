"""`sketchconv eval`: perplexity, divergence from a reference, and multiple-choice questions."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from sketchconv.evaluation.evaluate import Evaluation, ModelScore, ProgressCallback
    from sketchconv.evaluation.scores import Spread, TextScore
    from sketchconv.evaluation.windows import Cut

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_DTYPES = click.Choice(["float32", "bfloat16", "float16"], case_sensitive=False)


@click.command("eval")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--text", "texts", type=_FILE, multiple=True, help="UTF-8 text; may be repeated.")
@click.option("--reference", metavar="DENSE", help="Compare with this model: KL, top-1 agreement.")
@click.option(
    "--windows",
    type=click.IntRange(0),
    default=16,
    show_default=True,
    help="Windows from the start of each text; 0 takes all.",
)
@click.option(
    "--seq-len",
    type=click.IntRange(2),
    help="Tokens per window. [default: 1024, or as many as the models have positions for]",
)
@click.option("--stride", type=click.IntRange(1), help="Below --seq-len, windows overlap.")
@click.option("--choices", type=_FILE, help="JSON Lines: question, choices, answer.")
@click.option("--dtype", type=_DTYPES, help="Of the computation. [default: the model's own]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:n.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads. [default: all cores]")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw a chart, .png or .svg.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON on stdout.")
@click.option("--quiet", is_flag=True, help="No progress.")
def command(models: tuple[str, ...], **options: Any) -> None:
    """Measure each MODEL: a folder, a sketch, a .gguf file or a hub id, by one ruler for all.

    With --reference, tells how far each has moved from the model that it came from.
    """
    from sketchconv.evaluation.evaluate import evaluate
    from sketchconv.evaluation.plot import check_plot, save_plot

    plot = options["plot"]
    if not options["texts"] and options["choices"] is None:
        raise click.UsageError("give a --text, or --choices, or both")
    if plot is not None:
        if not options["texts"]:
            raise click.UsageError("--plot needs a --text: it draws what is measured on one")
        check_plot(plot)
    if options["threads"] is not None:
        from sketchconv.runtime.load import set_threads

        set_threads(options["threads"])
    _silence()
    cut = _cut(options)
    result = evaluate(
        models,
        _material(options["texts"], options["choices"]),
        reference=options["reference"],
        cut=cut,
        fit=options["seq_len"] is None,
        dtype=options["dtype"],
        device=options["device"],
        progress=None if options["quiet"] else _progress(),
    )
    if options["as_json"]:
        click.echo(json.dumps(_finite(result.to_json()), indent=2, allow_nan=False))
    else:
        _print(result)
    if plot is not None:  # last: what was measured must not be lost with it
        save_plot(result, plot)


def _cut(options: dict[str, Any]) -> Cut:
    from sketchconv.evaluation.windows import SEQ_LEN, Cut

    return Cut(options["seq_len"] or SEQ_LEN, options["stride"], options["windows"] or None)


def _material(texts: tuple[Path, ...], choices: Path | None) -> Any:
    from sketchconv.evaluation.choices import read_questions
    from sketchconv.evaluation.evaluate import Material
    from sketchconv.evaluation.windows import read_text

    short = len({path.stem for path in texts}) == len(texts)
    named = {path.stem if short else str(path): read_text(path) for path in texts}
    return Material(named, () if choices is None else read_questions(choices))


def _silence() -> None:
    """No progress bars of the weights: stdout and stderr are ours."""
    from transformers.utils import logging

    disable: Any = logging.disable_progress_bar
    disable()


def _progress() -> ProgressCallback:
    """One changing line on a terminal, nothing elsewhere."""

    def tick(name: str, done: int, total: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            sys.stderr.write(f"\r{name}: window {done} of {total}{end}")
            sys.stderr.flush()

    return tick


def _finite(value: Any) -> Any:
    """JSON has no infinity: a perplexity beyond all bounds becomes null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print(result: Evaluation) -> None:
    from rich import box
    from rich.table import Table

    from sketchconv.cli.render import print_rich

    every = [*result.models] if result.reference is None else [result.reference, *result.models]
    click.echo(_conditions(result))
    for model in every:
        if model.texts and model.context is not None and model.context < result.cut.seq_len:
            click.echo(f"{model.model}: windows are longer than its context of {model.context}")
    table = Table(box=box.SIMPLE)
    table.add_column("model", overflow="fold")
    for title in ("bits/weight", "text", "perplexity", "KL", "median", "99 %", "top-1 the same"):
        table.add_column(title, justify="left" if title == "text" else "right", no_wrap=True)
    for model in every:
        for n, text in enumerate(model.texts):
            first = [model.model, _bits(model)] if n == 0 else ["", ""]
            table.add_row(*first, *_text_row(text))
    if any(model.texts for model in every):
        print_rich(table)
    for model in every:
        _print_choices(model)
    for model in result.models:
        _print_layers(model)


def _conditions(result: Evaluation) -> str:
    cut = result.cut
    counts = {
        t.text: f"{t.windows} of them, {t.tokens:,} predictions" for t in result.models[0].texts
    }
    if not counts:
        return f"device {result.device}"
    stride = cut.seq_len if cut.stride is None else cut.stride
    opening = f", {result.opening} opening token(s) before each" if result.opening else ""
    texts = "; ".join(f"{name}: {count}" for name, count in counts.items())
    every = [*result.models] if result.reference is None else [result.reference, *result.models]
    dtypes = ", ".join(sorted({model.dtype for model in every}))
    return (
        f"windows of {cut.seq_len} tokens, stride {stride}{opening}; {texts}; "
        f"{dtypes} on {result.device}; KL in nats per token, +- standard error over windows"
    )


def _bits(model: ModelScore) -> str:
    return "" if model.bits_per_weight is None else f"{model.bits_per_weight:.2f}"


def _text_row(text: TextScore) -> list[str]:
    found = text.divergence
    row = [text.text, f"{text.perplexity:.2f}"]
    if found is None:
        return [*row, "", "", "", ""]
    same = _percent(found.agreement)
    return [*row, _spread(found.kl), f"{found.median:.4f}", f"{found.p99:.3f}", same]


def _spread(spread: Spread) -> str:
    error = "" if spread.error is None else f" +- {spread.error:.4f}"
    return f"{spread.mean:.4f}{error}"


def _percent(spread: Spread) -> str:
    error = "" if spread.error is None else f" +- {100 * spread.error:.1f}"
    return f"{100 * spread.mean:.1f}{error} %"


def _print_choices(model: ModelScore) -> None:
    found = model.choices
    if found is not None:
        click.echo(
            f"{model.model}: {found.questions} questions, right {100 * found.accuracy:.1f} "
            f"+- {100 * found.error:.1f} % by log-probability, {100 * found.accuracy_per_byte:.1f} "
            f"+- {100 * found.error_per_byte:.1f} % by log-probability per byte; "
            f"guessing {100 * found.chance:.1f} %"
        )


def _print_layers(model: ModelScore) -> None:
    errors = model.layers
    if errors:
        worst = max(range(len(errors)), key=errors.__getitem__)
        click.echo(
            f"{model.model}: relative error of the last hidden state {errors[-1]:.4f}, largest "
            f"{errors[worst]:.4f} after layer {worst} of {len(errors) - 1}"
        )
