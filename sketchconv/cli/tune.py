"""`sketchconv tune`: a sketch and data in, a task delta out."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from sketchconv.cli.delta_options import local

if TYPE_CHECKING:
    from sketchconv.tuning.options import TuneOptions, Tuning

_PATH: Final = click.Path(path_type=Path)
_COUNT: Final = click.IntRange(1)
# Options of TuneOptions: None means the default there, which the help repeats.
_OPTIONS: Final = (
    click.option("--max-steps", type=_COUNT, help="Stop after so many steps. [default: --epochs]"),
    click.option("--epochs", type=float, help="Passes over the data. [default: 3]"),
    click.option(
        "--learning-rate",
        type=float,
        help="Largest step of a LUT entry, as a share of its group's mean size. [default: 0.002]",
    ),
    click.option(
        "--absolute-steps",
        is_flag=True,
        help="--learning-rate in units of the weights, as in the paper (1e-4 to 2e-6 there).",
    ),
    click.option(
        "--optimizer",
        type=click.Choice(["adamw", "muon"]),
        help="Muon keeps half the state of AdamW. [default: adamw]",
    ),
    click.option("--batch-size", type=_COUNT, help="Rows per forward pass. [default: 4]"),
    click.option(
        "--gradient-accumulation", type=_COUNT, help="Forward passes per step. [default: 1]"
    ),
    click.option("--warmup", type=float, help="Steps, or below 1 their share. [default: 0.05]"),
    click.option(
        "--schedule",
        type=click.Choice(["linear", "cosine"]),
        help="How the learning rate falls after the warm-up. [default: linear]",
    ),
    click.option("--seq-len", type=click.IntRange(2), help="Tokens per row. [default: 512]"),
    click.option(
        "--packing/--no-packing",
        default=None,
        help="Put short samples into one row; none sees another. [default: packing]",
    ),
    click.option(
        "--gradient",
        type=click.Choice(["mean", "sum"]),
        help="Over the weights that share a LUT entry; the paper has mean. [default: sum]",
    ),
    click.option("--max-grad-norm", type=float, help="Clip gradients; 0: do not. [default: 1]"),
    click.option("--train-embeddings", is_flag=True, help="Sketched embeddings too."),
    click.option("--train-head", is_flag=True, help="A sketched output head too."),
    click.option("--eval-share", type=float, help="Held-out share of the data. [default: 0.05]"),
    click.option("--eval-steps", type=_COUNT, help="Steps between measurements. [default: 1/10]"),
    click.option(
        "--patience",
        type=click.IntRange(0),
        help="Stop after so many measurements without a new best; 0: never. [default: 3]",
    ),
    click.option(
        "--activation-checkpointing",
        "--gradient-checkpointing",
        is_flag=True,
        help="Compute activations twice, in less memory.",
    ),
    click.option(
        "--bf16/--no-bf16",
        default=None,
        help="Compute in bfloat16 (autocast). [default: where the hardware does]",
    ),
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="[default: auto]"),
    click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="[default: 0]"),
)
# Names on the command line that differ from the fields of TuneOptions.
_FIELDS: Final = {"train_embeddings": "embeddings", "train_head": "head"}


def _tune_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command("tune")
@click.argument("base", type=click.Path())
@click.option("--data", type=_PATH, required=True, help=".txt, or .jsonl as told above.")
@click.option("--output", "-o", type=_PATH, required=True, help="TASK.sktch, or a folder to make.")
@click.option("--eval-data", type=_PATH, help="Held-out data. [default: a share of --data]")
@click.option("--name", help="Of the task, for the delta's own description.")
@_tune_options
@click.option("--resume", is_flag=True, help="Go on after the last checkpoint.")
@click.option("--force", is_flag=True, help="Replace an output, drop an unfinished tuning.")
@click.option("--plot", type=_PATH, help="Draw the loss curve, .png or .svg.")
@click.option("--threads", type=_COUNT, help="CPU threads. [default: all cores]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
@click.option("--quiet", is_flag=True, help="No progress.")
def command(base: str, data: Path, output: Path, **options: Any) -> None:
    """Fine-tune the LUTs of the sketch BASE on a task, and write what changed as a delta.

    Indices, norms and biases stay; embeddings and heads too unless asked for. Lines of a .jsonl
    file hold "text", or "messages" (with the chat template of the model), or "prompt" and
    "completion"; of chats and completions only what the assistant says is learned. The LUTs with
    the lowest held-out loss are written.

    While it runs, checkpoints lie in OUTPUT.tuning: after an interruption, the same command with
    --resume goes on after the last one, and ends with the same bytes.
    """
    # Before torch is imported: idle threads of OpenMP would spin on cores that kernels need.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from sketchconv.cli.progress import silence_transformers
    from sketchconv.cli.tune_progress import show_tuning
    from sketchconv.runtime.load import set_threads
    from sketchconv.tuning.arguments import first_process
    from sketchconv.tuning.plot import check_curve_file, save_curve
    from sketchconv.tuning.run import tune

    if options["plot"] is not None:
        check_curve_file(options["plot"])
    if options["threads"] is not None:
        set_threads(options["threads"])
    silence_transformers()
    with show_tuning(quiet=options["quiet"] or not first_process()) as progress:
        result = tune(
            local(base),
            data,
            output,
            _chosen(options),
            eval_data=options["eval_data"],
            name=options["name"],
            resume=options["resume"],
            force=options["force"],
            progress=progress,
        )
    if not first_process():
        return
    if options["as_json"]:
        click.echo(json.dumps(result.to_json(), indent=2))
    else:
        _print(result)
    if options["plot"] is not None:  # last: the delta must not be lost with it
        save_curve(result.curve, options["plot"])


def _chosen(options: dict[str, Any]) -> TuneOptions:
    from dataclasses import fields

    from sketchconv.tuning.options import TuneOptions

    given = {_FIELDS.get(name, name): value for name, value in options.items()}
    known = {field.name for field in fields(TuneOptions)}
    changes = {name: value for name, value in given.items() if name in known and value is not None}
    return TuneOptions(**changes, relative=not options["absolute_steps"])


def _print(result: Tuning) -> None:
    from sketchconv.cli.render import human_bytes, print_table

    rows = [
        ("output", f"{result.output} ({human_bytes(result.output_bytes)})"),
        ("held-out loss", _losses(result)),
        ("trained", f"{result.trained:,} LUT values"),
        ("steps", f"{result.steps}, the best {result.best_step}"),
        ("data", f"{result.learned:,} learned tokens in {result.rows:,} rows"),
        ("held out", f"{result.eval_learned:,} learned tokens"),
        ("time", f"{result.seconds:.1f} s"),
    ]
    rows += [("note", note) for note in result.notes]
    print_table("Delta written", rows)


def _losses(result: Tuning) -> str:
    before, after = result.loss_before, result.loss_after
    text = f"{before:.4f} to {after:.4f} nats per token"
    if max(before, after) < math.log(1e6):
        text += f" (perplexity {math.exp(before):.2f} to {math.exp(after):.2f})"
    return text
