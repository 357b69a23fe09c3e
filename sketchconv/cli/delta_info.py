"""`sketchconv delta info`: what a delta holds, and whether it fits a base."""

from __future__ import annotations

import json

import click

from sketchconv.cli.delta_options import json_option, local, print_summary


@click.command("info")
@click.argument("delta", type=click.Path())
@click.option("--base", type=click.Path(), help="Also check that DELTA was made for this sketch.")
@json_option
def command(delta: str, *, base: str | None, as_json: bool) -> None:
    """Show what DELTA holds: mode, size, task, and the base that it is bound to."""
    from sketchconv.deltas import binding_of, info

    path = local(delta)
    summary = info(path)
    if base is not None:
        binding_of(path).require(binding_of(local(base)), delta, base)
    if as_json:
        fits = {} if base is None else {"fits": base}
        click.echo(json.dumps({**summary.to_json(), **fits}, indent=2))
        return
    print_summary(summary, as_json=False, title=summary.path)
    if base is not None:
        click.echo(f"fits {base}")
