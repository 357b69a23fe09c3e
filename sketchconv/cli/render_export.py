"""Tables of an export for people: its plan and its report, on stdout."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from sketchconv.cli.render import human_bytes, print_table

if TYPE_CHECKING:
    from sketchconv.export.folder import FolderJob
    from sketchconv.export.job import GgufJob
    from sketchconv.export.plan import ExportPlan
    from sketchconv.export.report import ExportReport


def print_export_plan(job: GgufJob, *, as_json: bool) -> None:
    """What an export would write, tensor by tensor in groups, and its exact size."""
    if as_json:
        click.echo(json.dumps(_plan_json(job), indent=2))
        return
    files = len(job.sizes)
    rows = [
        ("source", f"{job.source} ({job.source_format}, {human_bytes(job.source_bytes)})"),
        ("output", f"{job.output} ({files} file{'s' if files > 1 else ''})"),
        ("size", f"{job.output_bytes:,} bytes ({human_bytes(job.output_bytes)})"),
        ("parameters", f"{job.plan.parameters:,}"),
        ("bits per weight", f"{8 * job.output_bytes / max(1, job.plan.parameters):.3f} all-in"),
        ("tokenizer", job.tokenizer),
        *_type_rows(job.plan),
    ]
    rows += [("left out", f"{name}: {why}") for name, why in job.plan.left_out.items()]
    rows += [("note", note) for note in job.plan.notes]
    print_table("Plan (nothing was written)", rows)


def print_folder_plan(job: FolderJob, *, as_json: bool) -> None:
    """What an export to a folder would write, and its exact size."""
    if as_json:
        value = {
            "source": job.source.id,
            "output": str(job.output),
            "output_bytes": job.output_bytes,
            "files": job.sizes,
            "parameters": job.parameters,
            "types": dict(job.types),
            "notes": list(job.notes),
        }
        click.echo(json.dumps(value, indent=2))
        return
    rows = [
        ("source", f"{job.source.id} ({job.source.format}, {human_bytes(job.source.nbytes)})"),
        ("output", f"{job.output} ({len(job.sizes)} files)"),
        ("size", f"{job.output_bytes:,} bytes ({human_bytes(job.output_bytes)})"),
        *((kind, f"{count:,} values") for kind, count in Counter(job.types).most_common()),
        *(("note", note) for note in job.notes),
    ]
    print_table("Plan (nothing was written)", rows)


def print_export_report(report: ExportReport, title: str, *, as_json: bool) -> None:
    """The closing table of an export.

    Raises:
        ClickException: the output was written, but stdout does not take its report.
    """
    try:
        if as_json:
            click.echo(json.dumps(report.to_json(), indent=2))
        else:
            print_table(title, _report_rows(report))
    except BrokenPipeError:
        raise
    except OSError as error:
        place = report.files[0][0]
        text = f"{place}: was written, but its report could not be printed: {error.strerror}"
        raise click.ClickException(text) from error


def _report_rows(report: ExportReport) -> list[tuple[str, str]]:
    rate = report.source_bytes / max(report.seconds, 1e-9)
    rows = [("output", f"{path} ({human_bytes(size)})") for path, size in report.files]
    rows += [
        ("size before", f"{human_bytes(report.source_bytes)} in the source"),
        ("size after", f"{report.output_bytes:,} bytes ({human_bytes(report.output_bytes)})"),
        ("bits per weight", f"{report.bits_per_weight:.3f} all-in"),
        *((kind, f"{count:,} values") for kind, count in report.types.items()),
        ("time", f"{report.seconds:.1f} s ({human_bytes(rate)} of the source per second)"),
        ("peak memory", f"{human_bytes(report.peak_anonymous)} anonymous"),
    ]
    return rows + [("note", note) for note in report.notes]


def _type_rows(plan: ExportPlan) -> list[tuple[str, str]]:
    tensors: Counter[tuple[str, str]] = Counter()
    values: Counter[tuple[str, str]] = Counter()
    for step in plan.steps:
        key = step.info.type.name, step.reason
        tensors[key] += 1
        values[key] += step.parameters
    return [
        (kind, f"{count} tensors, {values[kind, reason]:,} values: {reason}")
        for (kind, reason), count in tensors.items()
    ]


def _plan_json(job: GgufJob) -> dict[str, Any]:
    return {
        "source": job.source,
        "output": str(job.output),
        "output_bytes": job.output_bytes,
        "files": job.sizes,
        "parameters": job.plan.parameters,
        "tokenizer": job.tokenizer,
        "types": job.plan.types(),
        "left_out": dict(job.plan.left_out),
        "notes": list(job.plan.notes),
        "tensors": [
            {
                "name": step.name,
                "source": step.source,
                "type": step.info.type.name,
                "shape": list(step.info.shape),
                "bytes": step.info.nbytes,
                "reason": step.reason,
            }
            for step in job.plan.steps
        ],
    }
