"""Tables for people: plans, reports and summaries, on stdout."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from sketchconv.report import sketched_bits_per_weight, step_json, stored_parameters

if TYPE_CHECKING:
    from rich.table import Table

    from sketchconv.calibration.report import RecoveryReport
    from sketchconv.job import Job
    from sketchconv.report import Report

_SHOWN_NOTES = 8


def human_bytes(count: float) -> str:
    """Bytes in decimal units, for instance ``98.4 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def print_table(title: str, rows: list[tuple[str, str]]) -> None:
    """Two columns: what, and its value."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    print_rich(table)


def print_rich(table: Table) -> None:
    """Print a table without cutting it to 80 columns when stdout is not a terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)


def print_plan(job: Job, *, as_json: bool) -> None:
    """What a conversion would do, and the exact size of its output."""
    if as_json:
        click.echo(json.dumps(_plan_json(job), indent=2))
        return
    steps = job.plan.steps
    parameters = stored_parameters(steps)
    coverage = job.plan.coverage
    rows = [
        ("source", f"{job.source.id} ({job.source.format}, {human_bytes(job.source.nbytes)})"),
        ("output", f"{job.output} ({len(job.sizes)} file{'s' if len(job.sizes) > 1 else ''})"),
        ("size", f"{job.output_bytes:,} bytes ({human_bytes(job.output_bytes)})"),
        ("parameters", f"{parameters:,}"),
        ("bits per weight", f"{8 * job.output_bytes / max(1, parameters):.3f} all-in"),
        ("sketched weights", f"{sketched_bits_per_weight(steps):.3f} bits per weight"),
        ("column weights", job.moments.description),
        ("coverage", f"{coverage.sketched:,} of {coverage.eligible:,} linear parameters"),
        ("working memory", f"{human_bytes(job.memory_bytes)} per chunk"),
    ]
    rows += [(action, text) for action, text in _reasons(job)]
    rows += [("note", note) for note in job.plan.notes]
    print_table("Plan (nothing was written)", rows)


def print_report(report: Report) -> None:
    """The closing table of a conversion."""
    saved = f"{report.dense_bytes / max(1, report.output_bytes):.2f} times smaller"
    worst = report.worst
    rows = [
        ("output", f"{report.output}"),
        ("size before", f"{human_bytes(report.source_bytes)} in the source"),
        ("size dense", f"{human_bytes(report.dense_bytes)} at 16 bits per weight"),
        ("size after", f"{human_bytes(report.output_bytes)} ({saved} than dense)"),
        (
            "bits per weight",
            f"{report.bits_per_weight:.3f} all-in, "
            f"{sketched_bits_per_weight(report.plan.steps):.3f} in sketched weights",
        ),
        ("column weights", report.weighting),
        ("relative error", f"{report.relative_error:.5f} over {len(report.results)} weights"),
    ]
    if worst is not None:
        rows.append(("worst weight", f"{worst.relative_error:.5f} {worst.name}"))
    weights = sum(r.parameters for r in report.results)
    solver = "solver" if report.jobs == 1 else f"solver in {report.jobs} processes together"
    rows.append(
        (
            "time",
            f"{report.seconds:.1f} s, of which {solver} {report.solve_seconds:.1f} s "
            f"({1e9 * report.solve_seconds / max(1, weights):.1f} ns per weight), "
            f"compiling it {report.compile_seconds:.1f} s",
        )
    )
    together = "" if report.jobs == 1 else f", {report.jobs} processes and this one together"
    rows.append(("peak memory", f"{human_bytes(report.peak_anonymous)} anonymous{together}"))
    rows += _calibration_rows(report)
    rows += [("note", note) for note in report.plan.notes]
    print_table("Sketch written", rows)


def _calibration_rows(report: Report) -> list[tuple[str, str]]:
    """What a calibration and a recovery did; the first few of its fallbacks."""
    calibration = report.calibration
    if calibration is None:
        return []
    text = (
        f"{calibration.method}, {calibration.tokens:,} tokens, {len(calibration.weights)} weights "
        f"in {calibration.blocks} blocks, {calibration.seconds:.1f} s "
        f"({calibration.device}, {calibration.dtype})"
    )
    rows = [("calibration", text)]
    if calibration.recovery is not None:
        rows.append(("recovery", _recovery_text(calibration.recovery)))
    notes = calibration.notes
    rows += [("note", note) for note in notes[:_SHOWN_NOTES]]
    if len(notes) > _SHOWN_NOTES:
        rows.append(("note", f"and {len(notes) - _SHOWN_NOTES} more; --json lists them"))
    return rows


def _recovery_text(recovery: RecoveryReport) -> str:
    if recovery.before is None or recovery.after is None:
        return recovery.note
    kept = "kept" if recovery.kept else "not kept"
    what = "KL" if recovery.measure == "kl" else "error"
    text = (
        f"{what} {recovery.before:.4f} to {recovery.after:.4f} on held-out tokens, {kept}; "
        f"{recovery.tokens:,} tokens, {recovery.seconds:.1f} s"
    )
    return f"{text}; {recovery.note}" if recovery.note else text


def _reasons(job: Job) -> list[tuple[str, str]]:
    counts: Counter[tuple[str, str]] = Counter()
    values: Counter[tuple[str, str]] = Counter()
    for step in job.plan.steps:
        counts[step.action, step.reason] += 1
        values[step.action, step.reason] += step.parameters
    return [
        (action, f"{counts[action, reason]} tensors, {values[action, reason]:,} values: {reason}")
        for action, reason in counts
    ]


def _plan_json(job: Job) -> dict[str, Any]:
    coverage = job.plan.coverage
    return {
        "source": job.source.id,
        "output": str(job.output),
        "output_bytes": job.output_bytes,
        "files": dict(job.sizes),
        "parameters": stored_parameters(job.plan.steps),
        "sketched_bits_per_weight": sketched_bits_per_weight(job.plan.steps),
        "weighting": job.moments.description,
        "coverage": {"sketched": coverage.sketched, "eligible": coverage.eligible},
        "memory_bytes": job.memory_bytes,
        "notes": list(job.plan.notes),
        "steps": [step_json(step) for step in job.plan.steps],
    }
