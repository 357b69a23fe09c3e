"""`sketchconv delta extract`: a full fine-tune in, a delta out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sketchconv.cli.delta_options import coding_options, force_option, json_option, local, task_of
from sketchconv.cli.options import SIZE

if TYPE_CHECKING:
    from sketchconv.calibration.options import Calibration
    from sketchconv.deltas import DeltaSummary
    from sketchconv.projection.report import ExtractReport

_NORMS = {
    "equal": "the weights",
    "diagonal": "the weights, columns weighed by their inputs",
    "hessian": "the outputs",
}


@click.command("extract")
@click.argument("base", type=click.Path())
@click.argument("tuned")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--dense-base", metavar="SRC", help="The dense model that BASE was made from.")
@click.option(
    "--target",
    type=click.Choice(["relative", "absolute"]),
    help="Project TUNED less the dense base, or TUNED itself. [default: relative, if there is one]",
)
@click.option(
    "--calibration",
    "texts",
    multiple=True,
    metavar="TEXT",
    help="Weigh columns by what TUNED makes of a .txt or .jsonl file, or of 'self' (its own text).",
)
@click.option("--tokens", type=click.IntRange(1), help="Calibration tokens. [default: 65536]")
@click.option(
    "--seq-len",
    type=click.IntRange(2),
    help="Tokens per window. [default: 1024, or fewer if the model takes no more]",
)
@click.option("--seed", type=click.IntRange(0), help="Of the choice of windows. [default: 0]")
@click.option("--device", help="Of the calibration: auto, cpu, cuda or cuda:n. [default: auto]")
@click.option(
    "--hessian",
    type=click.Choice(["diagonal", "full"]),
    help="With --calibration: weigh columns alone, or all they have in common. [default: full]",
)
@click.option("--strict", is_flag=True, help="Refuse TUNED if a delta cannot hold all it changed.")
@click.option("--max-memory", type=SIZE, help="Limit on anonymous memory, e.g. 2GB.")
@click.option("--threads", type=click.IntRange(1), help="Threads. [default: all cores]")
@coding_options
@force_option
@json_option
@click.option("--quiet", is_flag=True, help="No progress.")
def command(base: str, tuned: str, out: Path, **options: Any) -> None:
    """Make the delta OUT of BASE from TUNED, a full fine-tune or a merged LoRA.

    TUNED is a Hugging Face folder, a hub id or a .gguf file of the dense model that the sketch BASE
    was made from. Its weights are projected on BASE's index maps by least squares; what they
    capture is printed. A text (--calibration) makes most of the difference. Of a BASE that was made
    without one, --target absolute then calibrates the tables too. OUT ends in .sktch (one file), or
    is an adapter folder to make.
    """
    from sketchconv.cli.progress import show_progress, silence_transformers
    from sketchconv.deltas import create
    from sketchconv.export.metadata import model_name
    from sketchconv.projection.extract import Extraction

    silence_transformers()
    path = Path(local(base))
    task = {"name": model_name(tuned), "made_by": "extract", **task_of(options)}
    coding = {"dtype": options["values"], "mode": options["mode"], "span": options["span"]}
    with (
        Extraction(path, tuned, options["dense_base"], _options(options)) as work,
        show_progress(quiet=options["quiet"]) as progress,
    ):
        made = create(path, work.luts(progress), out, **coding, task=task, force=options["force"])
        report = work.report()
    if options["as_json"]:
        click.echo(json.dumps({"delta": made.to_json(), **report.to_json()}, indent=2))
    else:
        _print(report, made)


def _options(options: dict[str, Any]) -> Any:
    from sketchconv.projection.options import ExtractOptions

    calibration = _calibration(options)
    if options["hessian"] is not None and calibration is None:
        raise click.UsageError("--hessian goes with --calibration TEXT")
    return ExtractOptions(
        options["target"],
        calibration,
        options["hessian"] or "full",
        options["strict"],
        options["max_memory"],
        options["threads"],
    )


def _calibration(options: dict[str, Any]) -> Calibration | None:
    from sketchconv.calibration.options import Calibration

    fields = ("tokens", "seq_len", "seed", "device")
    given = {field: options[field] for field in fields if options[field] is not None}
    if not options["texts"]:
        if given:
            name = next(iter(given)).replace("_", "-")
            raise click.UsageError(f"--{name} goes with --calibration TEXT")
        return None
    return Calibration(text=options["texts"], **given)


def _print(report: ExtractReport, made: DeltaSummary) -> None:
    from rich import box
    from rich.table import Table

    from sketchconv.cli.render import human_bytes, print_rich, print_table

    table = Table(box=box.SIMPLE)
    table.add_column("weight", overflow="fold")
    for title in ("change", "captured", "error before", "after"):
        table.add_column(title, justify="right", no_wrap=True)
    for layer in report.layers:
        values = layer.to_json()
        table.add_row(
            layer.name,
            _number(values["relative_change"]),
            _percent(layer.captured),
            _number(values["error_before"]),
            _number(values["error_after"]),
        )
    print_rich(table)
    rows = [
        ("delta", f"{made.path} ({human_bytes(made.nbytes)})"),
        ("stored", "exactly" if made.exact else f"{made.values}, off by {made.largest_error:.2g}"),
        ("target", f"{report.target}, in the norm of {_NORMS[report.metric]}"),
        ("captured", f"{_percent(report.captured)} of the energy of all changes"),
        (
            "unrounded",
            f"{_percent(report.captured_unrounded)}, if LUTs were not of the base's dtype",
        ),
        ("weights", f"{report.changed} of {len(report.layers)} changed"),
        ("time", f"{report.seconds:.1f} s"),
        ("peak memory", f"{human_bytes(report.peak_anonymous)} anonymous"),
    ]
    if report.metric == "equal":
        rows.append(("note", "--calibration TEXT keeps more of what the change does to outputs"))
    rows += [("not held", str(entry)) for entry in report.unheld]
    print_table("Delta written", rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
