"""`sketchconv delta analyze`: ranks that a fine-tune needs, and sketches against low rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.table import Table

    from sketchconv.projection.analysis import Analysis, LayerAnalysis


@click.command("analyze")
@click.argument("base")
@click.argument("tuned")
@click.option("--bits", type=click.IntRange(1, 8), help="Bits of the sketches. [default: 4]")
@click.option(
    "--groups",
    type=click.IntRange(1),
    multiple=True,
    help="Groups per row of a sketch; may be repeated. [default: 1, 2, 4 and 8]",
)
@click.option(
    "--dense-base", metavar="SRC", help="Where BASE is a sketch: the dense model it was made from."
)
@click.option("--plot", type=click.Path(path_type=Path), help="Draw a chart, .png or .svg.")
@click.option("--threads", type=click.IntRange(1), help="Threads. [default: all cores]")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON on stdout.")
@click.option("--quiet", is_flag=True, help="No progress.")
def command(base: str, tuned: str, **options: Any) -> None:
    """Compare the update from BASE to TUNED with sketch updates and low-rank updates.

    Tells for each weight the rank that keeps 80, 90 and 95 % of the update's energy, and the error
    of the best sketch update and of the best low-rank update with as many parameters. BASE is the
    dense model, which is compressed as by convert, or a sketch, whose own index maps are taken.
    """
    from sketchconv.cli.progress import show_progress, silence_transformers
    from sketchconv.projection.plot import check_plot, save_plot

    plot = options["plot"]
    if plot is not None:
        check_plot(plot)
    silence_transformers()
    with show_progress(quiet=options["quiet"]) as progress:
        result = _analysis(base, tuned, options, progress)
    if options["as_json"]:
        click.echo(json.dumps(result.to_json(), indent=2))
    else:
        _print(result)
    if plot is not None:  # last: what was measured must not be lost with it
        save_plot(result, plot)


def _analysis(base: str, tuned: str, options: dict[str, Any], progress: Any) -> Analysis:
    from sketchconv.projection.analyze import BITS, GROUPS, analyze, analyze_sketch
    from sketchconv.summary import is_sketch

    path, threads = Path(base).expanduser(), options["threads"]
    if path.exists() and is_sketch(path):
        if options["bits"] is not None or options["groups"]:
            raise click.UsageError("--bits and --groups: a sketch as BASE has its own index maps")
        dense = options["dense_base"]
        return analyze_sketch(path, tuned, dense, threads=threads, progress=progress)
    if options["dense_base"] is not None:
        raise click.UsageError("--dense-base goes with a sketch as BASE")
    return analyze(
        base,
        tuned,
        bits=options["bits"] or BITS,
        groups=tuple(dict.fromkeys(options["groups"])) or GROUPS,
        threads=threads,
        progress=progress,
    )


def _print(result: Analysis) -> None:
    from sketchconv.cli.render import print_rich, print_table

    totals = result.totals
    print_rich(_layers(result, list(totals)))
    rows = [("base", result.base), ("tuned", result.tuned), ("update", result.start)]
    rows += [
        (f"rank for {100 * share:.0f} %", f"{100 * part:.1f} % of the full rank, on average")
        for share, part in result.mean_ranks.items()
    ]
    for label, total in totals.items():
        rows.append(
            (
                label,
                f"sketch {total.sketch:.4f} with {total.parameters:,} parameters, low rank "
                f"{total.low_rank:.4f} with {total.low_rank_parameters:,} (mean rank {total.rank})",
            )
        )
    rows += [("not compared", name) for name in result.dense]
    print_table("Error left of the whole update", rows)


def _layers(result: Analysis, labels: list[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    table.add_column("weight", overflow="fold")
    titles = ["change", "80 %", "90 %", "95 %", "of"]
    for title in (*titles, *(f"{label}: sketch | low rank" for label in labels)):
        table.add_column(title, justify="right", no_wrap=True)
    for layer in result.layers:
        table.add_row(*_row(layer, labels))
    return table


def _row(layer: LayerAnalysis, labels: list[str]) -> list[str]:
    change = "" if layer.relative is None else f"{layer.relative:.3g}"
    found = [layer.comparisons.get(label) for label in labels]
    errors = ["" if c is None else f"{c.sketch:.3f} | {c.low_rank:.3f}" for c in found]
    return [layer.name, change, *map(str, layer.ranks.values()), str(min(layer.shape)), *errors]
