"""`sketchconv delta merge`: task arithmetic, several deltas in one."""

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


class _Weighted(click.ParamType[tuple[str, float]]):
    """A path, or a path and a weight: `math.sktch=0.5`."""

    name = "delta[=weight]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, float]:
        """Split at the last equals sign, if a number follows it."""
        if isinstance(value, tuple):
            return value
        path, sign, number = str(value).rpartition("=")
        if not sign:
            return str(value), 1.0
        try:
            return path, float(number)
        except ValueError:
            self.fail(f"{number!r} is not a weight; write PATH=0.5", param, ctx)


@click.command("merge")
@click.argument("base", type=click.Path())
@click.argument("out", type=click.Path())
@click.argument("deltas", type=_Weighted(), nargs=-1, required=True, metavar="DELTA[=WEIGHT]...")
@coding_options
@force_option
@json_option
def command(base: str, out: str, deltas: tuple[tuple[str, float], ...], **options: Any) -> None:
    """Write base + sum of WEIGHT * (tuned - base) over the DELTAs, all made for BASE, as OUT.

    A weight is 1 if none is given, and may be negative. The order does not matter.
    """
    from sketchconv.deltas import merge

    summary = merge(
        [(local(delta), weight) for delta, weight in deltas],
        out,
        local(base),
        dtype=options["values"],
        mode=options["mode"],
        span=options["span"],
        task=task_of(options),
        force=options["force"],
    )
    print_summary(summary, as_json=options["as_json"], title="Delta written")
