"""`sketchconv push`: publish models, deltas and GGUF files on the Hub."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from sketchconv.hub.pushing import Progress
    from sketchconv.hub.report import PushReport


@click.command("push")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...", type=click.Path())
@click.argument("repo_id")
@click.option("--revision", help="Branch, made if it is missing, or refs/pr/N. [default: main]")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--public", is_flag=True, help="Make a new repository public. [default: private]")
@click.option("--message", "-m", help="Message of the commit.")
@click.option("--card/--no-card", default=True, show_default=True, help="Write the model card.")
@click.option(
    "--eval",
    "scores",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Put this output of `sketchconv eval --json` into the card.",
)
@click.option("--base-model", metavar="HUB_ID", help="Base named in the card. [default: recorded]")
@click.option("--license", help="Licence named in the card. [default: the base's]")
@click.option("--verify", is_flag=True, help="Check every digest first, not only the headers.")
@click.option("--dry-run", is_flag=True, help="Say what would be sent; send nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
@click.option("--quiet", is_flag=True, help="No progress.")
def command(models: tuple[str, ...], repo_id: str, **options: Any) -> None:
    """Send each MODEL to the repository REPO_ID (user/name) on the Hugging Face Hub.

    MODEL is a .sktch or .gguf file, or a folder of a sketch, a delta or a dense model. Only known
    files leave, none that holds a secret. What the repository has already is not sent again; run
    the same command after an interruption. The token is that of `hf auth login`, or HF_TOKEN.
    """
    from sketchconv.hub.pushing import push
    from sketchconv.hub.readme import CardOptions
    from sketchconv.hub.scores import read_scores

    _check_card_options(options)
    scores = None if options["scores"] is None else read_scores(options["scores"])
    card = CardOptions(options["card"], scores, options["base_model"], options["license"])
    with show_sending(quiet=options["quiet"]) as progress:
        report = push(
            models,
            repo_id,
            revision=options["revision"],
            create_pr=options["create_pr"],
            private=not options["public"],
            message=options["message"],
            card=card,
            verify=options["verify"],
            dry_run=options["dry_run"],
            progress=progress,
        )
    if options["as_json"]:
        click.echo(json.dumps(report.to_json(), indent=2))
    else:
        print_push(report)


def _check_card_options(options: dict[str, Any]) -> None:
    names = {"scores": "--eval", "base_model": "--base-model", "license": "--license"}
    given = [flag for name, flag in names.items() if options[name] is not None]
    if given and not options["card"]:
        raise click.UsageError(f"{given[0]} is about the card; leave out --no-card")


class _Interrupted(click.ClickException):
    """SIGINT or SIGTERM while something was being sent."""

    exit_code = 130

    def __init__(self) -> None:
        super().__init__(
            "interrupted. The one commit comes last, so the repository is as before, or complete; "
            "what has arrived is not sent again: run `sketchconv push` (again)"
        )


@contextmanager
def show_sending(*, quiet: bool) -> Iterator[Progress]:
    """One changing line on a terminal; huggingface_hub's own bars there, nowhere else."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    seen = not quiet and sys.stderr.isatty()
    if not seen:
        disable_progress_bars()

    def tick(stage: str, name: str, done: int, total: int) -> None:
        if seen:
            part = f" {100 * done / total:.0f} %" if total else ""
            sys.stderr.write(f"\r\033[K{stage} {name}{part}")
            sys.stderr.flush()

    try:
        yield tick
    except KeyboardInterrupt:
        raise _Interrupted from None
    finally:
        if seen:
            sys.stderr.write("\r\033[K")


def print_push(report: PushReport) -> None:
    """What was sent, to where; or what would be."""
    from rich import box
    from rich.table import Table

    from sketchconv.cli.render import human_bytes, print_rich

    table = Table(box=box.SIMPLE)
    table.add_column("file", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for file in report.files:
        table.add_row(file.name, human_bytes(file.size), file.state)
    print_rich(table)
    if report.left:
        click.echo(f"stays here: {', '.join(report.left)}")
    for note in report.notes:
        click.echo(f"note: {note}")
    click.echo(_outcome(report))


def _outcome(report: PushReport) -> str:
    kind = {True: "private", False: "public", None: ""}[report.private]
    place = " ".join(filter(None, ("new" if report.created else "", kind, "repository")))
    sizes = f"{report.sent_bytes:,} of {report.nbytes:,} bytes"
    branch = f", branch {report.revision}" if report.revision else ""
    if report.commit is None:
        return f"would send {sizes} to the {place} {report.url}{branch}"
    where = report.pull_request or report.url
    return (
        f"sent {sizes} to the {place} {where}{branch}; at commit {report.commit[:12]} the digests "
        f"of all {len(report.files)} files agree"
    )
