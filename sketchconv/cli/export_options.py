"""The options of `convert` that go with an export, and the exports themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import click

from sketchconv.cli.sketch_options import calibration_of, given_sketch_options

if TYPE_CHECKING:
    from sketchconv.export.folder import FolderJob
    from sketchconv.export.job import GgufJob
    from sketchconv.export.report import ExportReport

_OPTIONS: Final = (
    click.option(
        "--type",
        "type_name",
        metavar="TYPE",
        help="GGUF: type of the matrices: F16, Q8_0, Q4_K, Q4_K_M and so on. [default: exact] "
        "Dense: F32, F16 or BF16. [default: the model's own]",
    ),
    click.option(
        "--type-for",
        "choices",
        multiple=True,
        metavar="PATTERN=TYPE",
        help="GGUF: type of the tensors that a pattern names, e.g. ffn_down=Q8_0; the last wins.",
    ),
    click.option(
        "--tokenizer-pre",
        metavar="NAME",
        help="GGUF: how text is split, where it is not recognised.",
    ),
    click.option("--dense", is_flag=True, help="Decode SRC into a plain Hugging Face folder, OUT."),
    click.option(
        "--to",
        "target",
        type=click.Choice(["safetensors", "mlx"]),
        help="OUT becomes a folder: safetensors is --dense; mlx is for mlx-lm, exact, of a sketch "
        "made with --grid affine or symmetric.",
    ),
    click.option("--name", "model_name", help="GGUF: the model's name. [default: the source's]"),
    click.option("--modelfile", is_flag=True, help="GGUF: write a Modelfile for Ollama beside it."),
)
# Options of compression that say which columns of a GGUF's quantized types matter.
_CALIBRATED: Final = ("--calibration", "--tokens", "--seq-len", "--seed", "--device")
_RESUMED: Final = ("--resume", "--no-resume")
_NAMES: Final = {
    "type_name": "--type",
    "choices": "--type-for",
    "tokenizer_pre": "--tokenizer-pre",
    "model_name": "--name",
    "modelfile": "--modelfile",
}


def export_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of exports."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def refuse_export_options(options: Mapping[str, Any], allowed: tuple[str, ...] = ()) -> None:
    """Refuse what only a GGUF export takes, but for the options that are allowed.

    Raises:
        UsageError: names the option.
    """
    given = [flag for name, flag in _NAMES.items() if options[name] not in (None, (), False)]
    refused = [flag for flag in given if flag not in allowed]
    if refused:
        dense = ", or with --dense" if refused[0] == "--type" else ""
        raise click.UsageError(f"{refused[0]} goes with an output that ends in .gguf{dense}")


def _refuse_sketch_options(options: Mapping[str, Any], allowed: tuple[str, ...] = ()) -> None:
    given = [flag for flag in given_sketch_options(options) if flag not in allowed]
    if given:
        raise click.UsageError(
            f"{given[0]} is about sketches; to compress, make a .sktch first and export that"
        )


def write_folder(src: str, out: str, options: Mapping[str, Any]) -> None:
    """Export SRC as a plain Hugging Face folder, or for mlx-lm, or print the plan of it.

    Raises:
        UsageError: an option of compression or of GGUF was given.
        SketchconvError: as `prepare_dense`, `prepare_mlx` and `run_folder`.
    """
    mlx = options["target"] == "mlx"
    _refuse_sketch_options(options, allowed=_RESUMED)
    refuse_export_options(options, allowed=() if mlx else ("--type",))
    if options["force"]:
        kind = "an MLX" if mlx else "a dense"
        raise click.UsageError(f"--force: {kind} export replaces nothing; name a new folder")
    from sketchconv.cli.render_export import print_export_report, print_folder_plan
    from sketchconv.export.folder import run_folder

    job = _folder_job(src, out, options)
    if options["dry_run"]:
        job.source.close()
        print_folder_plan(job, as_json=options["as_json"])
        return
    from sketchconv.cli.progress import show_progress

    with show_progress(quiet=options["quiet"]) as progress:
        resume = options["resume"] is not False
        report = run_folder(job, resume=resume, progress=progress)
    title = "MLX model written" if mlx else "Dense model written"
    print_export_report(report, title, as_json=options["as_json"])


def _folder_job(src: str, out: str, options: Mapping[str, Any]) -> FolderJob:
    from sketchconv.job import DEFAULT_SHARD_BYTES

    settings = {
        "revision": options["revision"],
        "max_memory": options["max_memory"],
        "max_shard_size": options["max_shard_size"] or DEFAULT_SHARD_BYTES,
        "threads": options["threads"],
    }
    if options["target"] == "mlx":
        from sketchconv.export.mlx import prepare_mlx

        return prepare_mlx(src, out, **settings)
    from sketchconv.export.dense import prepare_dense

    return prepare_dense(src, out, options["type_name"], **settings)


def write_gguf(src: str, out: str, options: Mapping[str, Any]) -> None:
    """Export SRC as GGUF, or print the plan of it.

    Raises:
        UsageError: an option of compression was given.
        SketchconvError: as `prepare_gguf` and `run`.
    """
    _refuse_sketch_options(options, allowed=(*_CALIBRATED, *_RESUMED))
    from sketchconv.cli.render_export import print_export_plan, print_export_report
    from sketchconv.export.job import prepare_gguf
    from sketchconv.export.run import run

    job = prepare_gguf(
        src,
        out,
        _recipe(options),
        revision=options["revision"],
        max_memory=options["max_memory"],
        max_shard_size=options["max_shard_size"],
        threads=options["threads"],
        force=options["force"],
        calibration=calibration_of(options),
    )
    ends = _ends(job) if options["modelfile"] else ()
    if options["dry_run"]:
        job.reader.close()
        print_export_plan(job, as_json=options["as_json"])
        return
    from sketchconv.cli.progress import show_progress, silence_transformers

    if job.calibration is not None:
        silence_transformers()
    with show_progress(quiet=options["quiet"]) as progress:
        resume = options["resume"] is not False
        report = run(job, resume=resume, progress=progress)
    if options["modelfile"]:
        report = _with_modelfile(report, job, ends)
    print_export_report(report, "GGUF written", as_json=options["as_json"])


def _ends(job: GgufJob) -> tuple[int, ...]:
    """What a Modelfile needs of the source, which is closed by then; refuse one before the work."""
    from sketchconv.export.modelfile import check_modelfile, end_ids

    try:
        check_modelfile(job)
        return end_ids(job.reader)
    except BaseException:
        job.reader.close()
        raise


def _with_modelfile(report: ExportReport, job: GgufJob, ends: tuple[int, ...]) -> ExportReport:
    from sketchconv.export.modelfile import NO_TEMPLATE, write_modelfile

    path = write_modelfile(job.output, ends, overwrite=job.overwrite)
    written = str(job.output.parent / path.name), path.stat().st_size
    notes = (*report.notes, NO_TEMPLATE)
    return replace(report, files=(*report.files, written), notes=notes)


def _recipe(options: Mapping[str, Any]) -> Any:
    from sketchconv.export.recipe import AUTO, ExportRecipe, parse_choice

    return ExportRecipe(
        options["type_name"] or AUTO,
        tuple(parse_choice(text) for text in options["choices"]),
        options["tokenizer_pre"],
        options["model_name"],
    )
