"""Options and output that the commands of `sketchconv delta` share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sketchconv.errors import DeltaError

if TYPE_CHECKING:
    from sketchconv.deltas.applying import Rewritten
    from sketchconv.deltas.summary import DeltaSummary

_F = TypeVar("_F", bound=Callable[..., Any])
_MOST_TASK = 1 << 24

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
force_option = click.option("--force", is_flag=True, help="Replace an existing output.")


def local(model: str) -> str:
    """The path of a sketch or delta that is given as a path or as a hub id.

    Raises:
        SourceError: there is none; HubError: the Hub refused.
    """
    from sketchconv.hub.fetching import fetch

    return str(fetch(model))


def coding_options(command: _F) -> _F:
    """How a delta is written, and what it is for."""
    for option in reversed(
        (
            click.option(
                "--values",
                type=click.Choice(["same", "f16", "bf16", "i8"]),
                default="same",
                show_default=True,
                help="Type of the stored values; same is the type of the base's LUTs.",
            ),
            click.option(
                "--mode",
                type=click.Choice(["xor", "replace", "add"]),
                help="xor: exact, undone without the base. [default: xor for same, else add]",
            ),
            click.option(
                "--span",
                type=click.IntRange(1),
                help="Changed groups that share a scale, for i8. [default: 1]",
            ),
            click.option("--name", help="Name of the task."),
            click.option("--description", help="What the delta is for."),
            click.option(
                "--task",
                "task_file",
                type=click.Path(dir_okay=False),
                help="JSON file with more of the task: data, training.",
            ),
        )
    ):
        command = option(command)
    return command


def task_of(options: dict[str, Any]) -> dict[str, Any]:
    """The task that the options describe.

    Raises:
        DeltaError: the file is not one JSON object.
    """
    task: dict[str, Any] = {}
    if options["task_file"]:
        task = _read_task(Path(options["task_file"]))
    named = {key: options[key] for key in ("name", "description") if options[key] is not None}
    return {**task, **named}


def print_summary(summary: DeltaSummary, *, as_json: bool, title: str) -> None:
    """A delta on stdout."""
    if as_json:
        click.echo(json.dumps(summary.to_json(), indent=2))
        return
    from sketchconv.cli.render import print_table
    from sketchconv.deltas.summary import facts

    print_table(title, facts(summary))


def print_rewritten(result: Rewritten, *, as_json: bool, title: str) -> None:
    """A sketch that was written, on stdout."""
    if as_json:
        click.echo(json.dumps(result.to_json(), indent=2))
        return
    from sketchconv.cli.render import human_bytes, print_table

    rows = [
        ("output", result.output),
        ("size", f"{result.nbytes:,} bytes ({human_bytes(result.nbytes)})"),
        ("changed weights", f"{result.weights:,}"),
        ("delta", result.delta),
        ("applied now", ", ".join(result.applied) or "nothing: this is the base"),
    ]
    print_table(title if result.written else "Checked (nothing was written)", rows)


def _read_task(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MOST_TASK:
        raise DeltaError(f"{path}: more than {_MOST_TASK} bytes for a task")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DeltaError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise DeltaError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
