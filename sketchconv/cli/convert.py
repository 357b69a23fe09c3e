"""`sketchconv convert`: checkpoint in, sketch out; or a model in, GGUF out."""

from __future__ import annotations

import glob
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sketchconv.cli.export_options import (
    export_options,
    refuse_export_options,
    write_folder,
    write_gguf,
)
from sketchconv.cli.options import SIZE
from sketchconv.cli.sketch_options import (
    calibration_of,
    given_sketch_options,
    recipe_of,
    sketch_options,
)

if TYPE_CHECKING:
    from sketchconv.job import Job


@click.command("convert")
@click.argument("src")
@click.argument("out", type=click.Path())
@sketch_options
@export_options
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    help="Of a quantized SRC without config: the folder of the model that was quantized.",
)
@click.option("--threads", type=click.IntRange(1), help="Threads. [default: all cores]")
@click.option(
    "--jobs",
    type=click.IntRange(1),
    help="Processes that share the work of a sketch, within --threads and --max-memory. "
    "[default: 1]",
)
@click.option("--max-memory", type=SIZE, help="Limit on anonymous memory, e.g. 2GB.")
@click.option(
    "--max-shard-size", type=SIZE, help="Split larger outputs. [default: 5GB for a folder]"
)
@click.option("--dry-run", is_flag=True, help="Print the plan and the exact size; write nothing.")
@click.option("--push-to", metavar="REPO_ID", help="Then publish OUT there; see `push --help`.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
@click.option("--quiet", is_flag=True, help="No progress.")
def command(src: str, out: str, **options: Any) -> None:
    """Compress the checkpoint SRC into the sketch OUT, or export SRC as GGUF.

    SRC is a Hugging Face folder (weights in 8-bit floats with scales are read as what they stand
    for), a hub id (org/name) or a .gguf file, of a split one any part; or
    a checkpoint that another project quantized (GPTQ, AWQ, bitsandbytes, LeanQuant, SketchTune,
    SqueezeLLM, Any-Precision LLM), whose indices and tables are taken over as they are. OUT is a
    path that ends in .sktch (one self-contained file) or a folder to make (Hugging Face layout).

    Without --calibration no text is needed. Where the architecture is known, --weighting moments
    weighs columns by second moments propagated through the network, and covariances propagates
    those of whole inputs and compensates errors with them: slower, the default at 3 bits and fewer.

    If OUT ends in .gguf, SRC is exported for llama.cpp; it may then be a sketch too. --type says
    how its matrices are stored; without it every value stays exact. With --calibration quantized
    types lose less: the columns that a text makes most use of count most. With --dense OUT becomes
    a plain Hugging Face folder of the decoded weights. With --to mlx it is a folder for mlx-lm that
    holds a sketch's weights exactly, or is refused. What was interrupted goes on.

    With --push-to the result is sent to a repository on the Hub, a private one if it is new; `push`
    has more options. The token is checked before the work begins.
    """
    _check_target(options)
    _check_output(out, options)
    if options["jobs"] is not None and (options["target"] or out.lower().endswith(".gguf")):
        raise click.UsageError("--jobs goes with a sketch as OUT; an export has threads alone")
    if options["target"]:
        write_folder(src, out, options)
    elif out.lower().endswith(".gguf"):
        write_gguf(src, out, options)
    else:
        refuse_export_options(options)
        _compress(src, out, options)
    if options["push_to"] and not options["dry_run"]:
        _push(src, out, options)


def _check_output(out: str, options: dict[str, Any]) -> None:
    """Settle what OUT becomes: `target` is None for a sketch or GGUF, by its name."""
    if options["dense"]:
        if options["target"] == "mlx":
            raise click.UsageError("--dense and --to mlx are two different folders; give one")
        options["target"] = "safetensors"
    flag = "--dense" if options["dense"] else f"--to {options['target']}"
    if options["target"] and out.lower().endswith((".gguf", ".sktch")):
        raise click.UsageError(f"{flag} makes a folder; name OUT without a suffix")
    if options["base"] is not None and (options["target"] or out.lower().endswith(".gguf")):
        raise click.UsageError("--base goes with a sketch as OUT; export that sketch afterwards")


def _check_target(options: dict[str, Any]) -> None:
    """Refuse what could not be published, before hours of work."""
    if options["push_to"] is None:
        return
    if options["as_json"]:
        raise click.UsageError("--push-to prints a report of its own; run push after it for JSON")
    from sketchconv.hub.pushing import check_target

    check_target(options["push_to"])


def _push(src: str, out: str, options: dict[str, Any]) -> None:
    from sketchconv.cli.push import print_push, show_sending
    from sketchconv.errors import SketchconvError
    from sketchconv.hub.origin import origin_of
    from sketchconv.hub.pushing import push
    from sketchconv.hub.readme import CardOptions

    try:
        with show_sending(quiet=options["quiet"]) as progress:
            # Sketches and GGUF files say themselves where they come from, other folders do not.
            base = origin_of(src, options["revision"]) if options["target"] else None
            card = CardOptions(base_model=base)
            report = push(_written(out), options["push_to"], card=card, progress=progress)
    except SketchconvError as error:
        text = f"{out} was written, but not published: {error}; `sketchconv push` sends it"
        raise click.ClickException(text) from error
    print_push(report)


def _written(out: str) -> str:
    """OUT itself, or the first part of a GGUF that was split."""
    path = Path(out)
    if path.exists():
        return out
    parts = sorted(path.parent.glob(f"{glob.escape(path.stem)}-00001-of-*{path.suffix}"))
    return str(parts[-1]) if parts else out


def _refuse_fitting(job: Job, options: dict[str, Any]) -> None:
    """Options of compression say nothing of sketches that are taken over."""
    kept = ("--bits", "--exclude")
    odd = [flag for flag in given_sketch_options(options) if flag not in kept]
    if job.plan.ready and odd:
        job.source.close()
        raise click.UsageError(
            f"{odd[0]}: the weights of {job.source.id} are taken over as they are ("
            f"{job.source.format}), and nothing is compressed again; drop {odd[0]}"
        )


def _compress(src: str, out: str, options: dict[str, Any]) -> None:
    from sketchconv.cli.render import print_plan, print_report
    from sketchconv.importers.base import ImportOptions
    from sketchconv.job import DEFAULT_SHARD_BYTES, prepare
    from sketchconv.pipeline import run

    job = prepare(
        src,
        out,
        recipe_of(options),
        revision=options["revision"],
        max_memory=options["max_memory"],
        max_shard_size=options["max_shard_size"] or DEFAULT_SHARD_BYTES,
        force=options["force"],
        calibration=calibration_of(options),
        imports=ImportOptions(options["base"], options["bits"]),
        jobs=options["jobs"] or 1,
    )
    _refuse_fitting(job, options)
    if options["dry_run"]:
        job.source.close()
        print_plan(job, as_json=options["as_json"])
        return
    from sketchconv.cli.progress import show_progress, silence_transformers

    if job.calibration is not None:
        silence_transformers()
    with show_progress(quiet=options["quiet"]) as progress:
        resume = options["resume"] is not False
        report = run(job, threads=options["threads"], resume=resume, progress=progress)
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
