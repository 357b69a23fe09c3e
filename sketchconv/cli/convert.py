"""`sketchconv convert`: checkpoint in, sketch out."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import click

from sketchconv.calibration.options import Calibration
from sketchconv.cli.options import SIZE
from sketchconv.recipe import Recipe, SketchSpec
from sketchconv.recipe_file import load_recipe

_DTYPES = click.Choice(["F16", "BF16", "F32"], case_sensitive=False)
_WEIGHTINGS = click.Choice(["covariances", "moments", "equal"])
_BITS = click.IntRange(1, 8)


@click.command("convert")
@click.argument("src")
@click.argument("out", type=click.Path())
@click.option("--bits", type=_BITS, help="Bits per index. [default: 4]")
@click.option("--groups", type=click.IntRange(1), help="Groups per row. [default: 1]")
@click.option(
    "--group-size", type=click.IntRange(1), help="Columns per group, instead of --groups."
)
@click.option("--embed-bits", type=_BITS, help="Sketch embeddings and head too, at these bits.")
@click.option("--lut-dtype", type=_DTYPES, help="Dtype of the LUT entries. [default: F16]")
@click.option("--include", multiple=True, metavar="PATTERN", help="Sketch only these weights.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Copy these weights.")
@click.option("--recipe", "recipe_file", type=click.Path(), help="TOML file with overrides.")
@click.option(
    "--weighting", type=_WEIGHTINGS, help="Without a text: see above. [default: by the bits]"
)
@click.option("--equal-weights", is_flag=True, help="The same as --weighting equal.")
@click.option("--exact", is_flag=True, help="Solve each group to the global optimum (slower).")
@click.option(
    "--calibration",
    "texts",
    multiple=True,
    metavar="TEXT",
    help="Calibrate on a .txt or .jsonl file, 'self' (text that the model writes itself) or a data "
    "set of the Hub; several give equal shares.",
)
@click.option(
    "--tokens", type=click.IntRange(1), help="Calibration tokens. [default: 65536, if there are]"
)
@click.option("--seq-len", type=click.IntRange(2), help="Tokens per window. [default: 1024]")
@click.option("--seed", type=click.IntRange(0), help="Of the choice of windows. [default: 0]")
@click.option(
    "--method", help="rtn, kmeans, gptq, leanquant or sketch. [default with a text: sketch]"
)
@click.option("--device", help="auto, cpu, cuda or cuda:n. [default: auto]")
@click.option(
    "--recover",
    type=click.IntRange(0),
    metavar="TOKENS",
    help="Train the LUTs on so many tokens; 0 for none. [default: 32768 at 3 bits and below]",
)
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--threads", type=click.IntRange(1), help="Solver threads. [default: all cores]")
@click.option("--max-memory", type=SIZE, help="Limit on anonymous memory, e.g. 2GB.")
@click.option("--max-shard-size", type=SIZE, default="5GB", show_default=True)
@click.option("--dry-run", is_flag=True, help="Print the plan and the exact size; write nothing.")
@click.option("--force", is_flag=True, help="Replace an existing sketch.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
@click.option("--quiet", is_flag=True, help="No progress.")
def command(src: str, out: str, **options: Any) -> None:
    """Compress the checkpoint SRC into the sketch OUT.

    SRC is a Hugging Face folder, a hub id (org/name) or a .gguf file. OUT is a path that ends in
    .sktch (one self-contained file) or a folder to make (Hugging Face layout).

    Without --calibration no text is needed. Where the architecture is known, --weighting moments
    weighs columns by second moments propagated through the network, and covariances propagates
    those of whole inputs and compensates errors with them: slower, the default at 3 bits and fewer.
    """
    from sketchconv.cli.render import print_plan, print_report
    from sketchconv.job import prepare
    from sketchconv.pipeline import run

    job = prepare(
        src,
        out,
        _recipe(options),
        revision=options["revision"],
        max_memory=options["max_memory"],
        max_shard_size=options["max_shard_size"],
        force=options["force"],
        calibration=_calibration(options),
    )
    if options["dry_run"]:
        job.source.close()
        print_plan(job, as_json=options["as_json"])
        return
    from sketchconv.cli.progress import show_progress

    if job.calibration is not None:
        _silence()
    with show_progress(quiet=options["quiet"]) as progress:
        report = run(job, threads=options["threads"], progress=progress)
    try:
        if options["as_json"]:
            click.echo(json.dumps(report.to_json(), indent=2))
        else:
            print_report(report)
    except BrokenPipeError:
        raise
    except OSError as error:
        text = f"{out}: was written, but its report could not be printed: {error.strerror}"
        raise click.ClickException(text) from error


def _silence() -> None:
    """No bars of transformers' own between ours."""
    from transformers.utils import logging

    disable: Any = logging.disable_progress_bar
    disable()


def _calibration(options: dict[str, Any]) -> Calibration | None:
    """The calibration that the options describe; None where none of them is given."""
    fields = ("tokens", "seq_len", "seed", "device", "recover")
    given = {field: options[field] for field in fields if options[field] is not None}
    if options["texts"]:
        given["text"] = options["texts"]
    elif given:
        name = next(iter(given)).replace("_", "-")
        raise click.UsageError(f"--{name} goes with --calibration TEXT")
    if options["method"] is not None:
        given["method"] = options["method"]
    return Calibration(**given) if given else None


def _recipe(options: dict[str, Any]) -> Recipe:
    """Defaults, then the recipe file, then the options of the command line."""
    if options["groups"] is not None and options["group_size"] is not None:
        raise click.UsageError("give --groups or --group-size, not both")
    file = options["recipe_file"]
    recipe = load_recipe(file) if file is not None else Recipe()
    changes: dict[str, Any] = {"default": _spec(recipe.default, options)}
    if options["embed_bits"] is not None:
        changes["embed_bits"] = options["embed_bits"]
    if options["weighting"] is not None:
        changes["weighting"] = options["weighting"]
    if options["equal_weights"]:
        changes["weighting"] = "equal"
    if options["exact"]:
        changes["exact"] = True
    changes["include"] = (*recipe.include, *options["include"])
    changes["exclude"] = (*recipe.exclude, *options["exclude"])
    return dataclasses.replace(recipe, **changes)


def _spec(spec: SketchSpec, options: dict[str, Any]) -> SketchSpec:
    fields = ("bits", "groups", "group_size", "lut_dtype")
    changes = {field: options[field] for field in fields if options[field] is not None}
    if options["groups"] is not None:
        changes["group_size"] = None
    return dataclasses.replace(spec, **changes)
