"""`sketchconv delta revert`: a tuned sketch back to the base's own bytes."""

from __future__ import annotations

import click

from sketchconv.cli.delta_options import force_option, json_option, local, print_rewritten


@click.command("revert")
@click.argument("tuned", type=click.Path())
@click.argument("delta", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--base", type=click.Path(), help="The base; needed unless DELTA is of mode xor.")
@click.option("--dry-run", is_flag=True, help="Check sketch, delta and output; write nothing.")
@force_option
@json_option
def command(
    tuned: str,
    delta: str,
    out: str,
    *,
    base: str | None,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Take DELTA, which was applied to the sketch TUNED, back and write OUT.

    Without any other delta applied, OUT has the bytes of the base.
    """
    from sketchconv.cli.progress import show_bytes
    from sketchconv.deltas import revert

    known = None if base is None else local(base)
    with show_bytes("reverting") as progress:
        result = revert(
            local(tuned),
            local(delta),
            out,
            base=known,
            force=force,
            dry_run=dry_run,
            progress=progress,
        )
    print_rewritten(result, as_json=as_json, title="Delta reverted")
