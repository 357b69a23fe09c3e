"""`sketchconv delta create`: what a tuned sketch changed in its base."""

from __future__ import annotations

from typing import Any

import click

from sketchconv.cli.delta_options import (
    coding_options,
    force_option,
    json_option,
    local,
    print_summary,
    task_of,
)


@click.command("create")
@click.argument("base", type=click.Path())
@click.argument("tuned", type=click.Path())
@click.argument("out", type=click.Path())
@coding_options
@force_option
@json_option
def command(base: str, tuned: str, out: str, **options: Any) -> None:
    """Write what the sketch TUNED changed in the LUTs of the sketch BASE as the delta OUT.

    OUT is a path that ends in .sktch, or an adapter folder to make. Both sketches must agree in
    everything but their LUTs.
    """
    from sketchconv.deltas import create

    summary = create(
        local(base),
        local(tuned),
        out,
        dtype=options["values"],
        mode=options["mode"],
        span=options["span"],
        task=task_of(options),
        force=options["force"],
    )
    print_summary(summary, as_json=options["as_json"], title="Delta written")
