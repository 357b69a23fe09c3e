"""`sketchconv delta export`: a delta as a merged model, or as a low-rank adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sketchconv.cli.delta_options import local
from sketchconv.cli.options import SIZE

if TYPE_CHECKING:
    from sketchconv.projection.adapter import AdapterReport

_LORA = {"rank": "--rank", "min_energy": "--min-energy"}


@click.command("export")
@click.argument("delta", type=click.Path())
@click.argument("base", type=click.Path())
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "form",
    type=click.Choice(["lora", "gguf", "safetensors"]),
    required=True,
    help="A LoRA adapter (a folder for peft, or an OUT.gguf for llama.cpp), or the merged model.",
)
@click.option(
    "--type",
    "type_name",
    metavar="TYPE",
    help="gguf: as in convert. [default: exact] safetensors: F32, F16 or BF16. [default: the "
    "model's own] lora: the same. [default: F16]",
)
@click.option("--rank", type=click.IntRange(1), help="lora: of the factors. [default: 64]")
@click.option(
    "--min-energy",
    type=click.FloatRange(0, 1),
    help="lora: refuse to lose more of the change than this keeps. [default: 0.8]",
)
@click.option("--max-memory", type=SIZE, help="gguf, safetensors: limit on anonymous memory.")
@click.option("--threads", type=click.IntRange(1), help="Threads. [default: all cores]")
@click.option(
    "--resume/--no-resume",
    default=None,
    help="gguf, safetensors: go on with what an interrupted run left, or drop that. "
    "[default: go on]",
)
@click.option("--force", is_flag=True, help="Replace an existing .gguf file.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
@click.option("--quiet", is_flag=True, help="No progress.")
def command(delta: str, base: str, out: Path, **options: Any) -> None:
    """Write DELTA, made for the sketch BASE, as OUT for other tools.

    gguf and safetensors are the merged model, exact. lora is an adapter of the dense model: a
    change of lookup tables is not of low rank, so it is approximate, and what it keeps is printed.
    """
    form = options["form"]
    given = [flag for name, flag in _LORA.items() if options[name] is not None]
    if form != "lora" and given:
        raise click.UsageError(f"{given[0]} goes with --to lora")
    if form == "lora" and options["max_memory"] is not None:
        raise click.UsageError("--max-memory goes with --to gguf and --to safetensors")
    if form == "lora" and options["resume"] is not None:
        raise click.UsageError("--resume goes with --to gguf and --to safetensors")
    if form == "gguf" and out.suffix.lower() != ".gguf":
        raise click.UsageError("--to gguf: OUT must end in .gguf")
    if options["force"] and out.suffix.lower() != ".gguf":
        raise click.UsageError("--force: a folder replaces nothing; name a new one")
    if form == "lora":
        _adapter(Path(local(delta)), Path(local(base)), out, options)
    else:
        _merged(Path(local(delta)), Path(local(base)), out, options)


def _merged(delta: Path, base: Path, out: Path, options: dict[str, Any]) -> None:
    from sketchconv.cli.progress import show_progress
    from sketchconv.cli.render_export import print_export_report
    from sketchconv.projection.export import export_gguf, export_safetensors

    kind = options["type_name"]
    common = {name: options[name] for name in ("max_memory", "threads")}
    common["resume"] = options["resume"] is not False
    with show_progress(quiet=options["quiet"]) as progress:
        if options["form"] == "safetensors":
            report = export_safetensors(delta, base, out, kind, progress=progress, **common)
            title = "Dense model written"
        else:
            from sketchconv.export.recipe import AUTO, ExportRecipe

            recipe, force = ExportRecipe(kind or AUTO), options["force"]
            report = export_gguf(delta, base, out, recipe, force=force, progress=progress, **common)
            title = "GGUF written"
    print_export_report(report, title, as_json=options["as_json"])


def _adapter(delta: Path, base: Path, out: Path, options: dict[str, Any]) -> None:
    from sketchconv.cli.progress import show_progress
    from sketchconv.projection.adapter import DEFAULT_MIN_ENERGY, DEFAULT_RANK, export_lora

    least = options["min_energy"]
    with show_progress(quiet=options["quiet"]) as progress:
        report = export_lora(
            delta,
            base,
            out,
            rank=options["rank"] or DEFAULT_RANK,
            min_energy=DEFAULT_MIN_ENERGY if least is None else least,
            dtype=options["type_name"] or "F16",
            force=options["force"],
            threads=options["threads"],
            progress=progress,
        )
    if options["as_json"]:
        click.echo(json.dumps(report.to_json(), indent=2))
    else:
        _print(report)


def _print(report: AdapterReport) -> None:
    from sketchconv.cli.render import human_bytes, print_table

    rows = [(name, f"{100 * share:.1f} % captured") for name, share in report.weights.items()]
    rows += [("output", f"{path} ({human_bytes(size)})") for path, size in report.files]
    rows += [
        ("rank", f"{report.rank}, alpha {report.rank} (scale 1)"),
        ("captured", f"{100 * report.captured:.2f} % of the energy of the whole change"),
        ("time", f"{report.seconds:.1f} s"),
        ("peak memory", f"{human_bytes(report.peak_anonymous)} anonymous"),
    ]
    print_table("Adapter written (approximate)", rows)
