"""`sketchconv verify`: every digest and every rule; optionally the errors against the source."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click


@click.command("verify")
@click.argument("path", type=click.Path())
@click.option("--against", metavar="SRC", help="Recompute the errors against this source.")
@click.option(
    "--revision", help="Branch, tag or commit of PATH if it is a hub id, else of --against."
)
@click.option(
    "--base", type=click.Path(path_type=Path), help="Base model of a quantized SRC without config."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def command(
    path: str, *, against: str | None, revision: str | None, base: Path | None, as_json: bool
) -> None:
    """Check the sketch or the delta at PATH; exit with 1 if anything is wrong.

    PATH may also be user/repo or user/repo:file on the Hub.

    With --against, errors are computed again from the source that a sketch was made from, and a
    delta is compared with its base, and its results with their digests.
    """
    from sketchconv.cli.progress import show_bytes
    from sketchconv.hub.fetching import fetch
    from sketchconv.verify import verify

    own = None if Path(path).expanduser().exists() else revision
    local = fetch(path, own)
    revision = revision if own is None else None
    with show_bytes() as progress:
        result = verify(local, against=against, revision=revision, base=base, progress=progress)
    if as_json:
        click.echo(json.dumps(result.to_json(), indent=2))
    else:
        for finding in result.findings:
            click.echo(f"FAILED {finding}")
        for line in result.lines():
            click.echo(line)
    if result.findings:
        sys.exit(1)
