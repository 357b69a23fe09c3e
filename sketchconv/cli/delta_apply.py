"""`sketchconv delta apply`: base and delta in, tuned sketch out."""

from __future__ import annotations

import click

from sketchconv.cli.delta_options import force_option, json_option, local, print_rewritten


@click.command("apply")
@click.argument("base", type=click.Path())
@click.argument("delta", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--dry-run", is_flag=True, help="Check base, delta and output; write nothing.")
@force_option
@json_option
def command(base: str, delta: str, out: str, *, dry_run: bool, force: bool, as_json: bool) -> None:
    """Write the sketch that DELTA makes of BASE as OUT, in the form of BASE.

    The digests that DELTA is bound to are compared first. What was applied is recorded in OUT, so
    that `delta revert` gives the bytes of BASE back.
    """
    from sketchconv.cli.progress import show_bytes
    from sketchconv.deltas import apply

    with show_bytes("applying") as progress:
        result = apply(
            local(base), local(delta), out, force=force, dry_run=dry_run, progress=progress
        )
    print_rewritten(result, as_json=as_json, title="Delta applied")
