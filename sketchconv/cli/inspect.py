"""`sketchconv inspect`: what a model file or folder holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from sketchconv.summary import Summary, TensorRow


@click.command("inspect")
@click.argument("path", type=click.Path())
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--all", "every", is_flag=True, help="One line per tensor instead of per kind.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON on stdout.")
def command(path: str, *, revision: str | None, every: bool, as_json: bool) -> None:
    """Show what PATH holds: a .sktch, .safetensors or .gguf file, a delta, or a folder of them.

    PATH may also be user/repo or user/repo:file on the Hub.
    """
    from sketchconv.hub.fetching import fetch
    from sketchconv.summary import fold_layers, summarise

    summary = summarise(fetch(path, revision))
    if as_json:
        click.echo(json.dumps(summary.to_json(), indent=2))
        return
    _print_facts(summary)
    _print_tensors(summary.rows if every else fold_layers(summary.rows))


def _print_facts(summary: Summary) -> None:
    from sketchconv.cli.render import human_bytes, print_table

    rows = [
        *summary.facts,
        ("size", f"{summary.nbytes:,} bytes ({human_bytes(summary.nbytes)})"),
        ("parameters", f"{summary.parameters:,}"),
        ("bits per weight", f"{summary.bits_per_weight:.3f} all-in"),
    ]
    print_table(summary.path, rows)


def _print_tensors(rows: Sequence[TensorRow]) -> None:
    from rich import box
    from rich.table import Table

    from sketchconv.cli.render import human_bytes, print_rich

    table = Table(box=box.SIMPLE)
    table.add_column("tensor", overflow="fold", min_width=28)
    table.add_column("stored as", no_wrap=True)
    for title in ("shape", "size", "error"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row.name} x{row.count}" if row.count > 1 else row.name,
            _stored_as(row),
            "x".join(map(str, row.shape)),
            human_bytes(row.nbytes),
            "" if row.error is None else f"{row.error:.5f}",
        )
    print_rich(table)


def _stored_as(row: TensorRow) -> str:
    if row.storage == "sketch":
        return f"{row.bits}-bit {row.dtype} G={row.groups}"
    return row.dtype if row.storage in ("dense", "delta") else row.storage
