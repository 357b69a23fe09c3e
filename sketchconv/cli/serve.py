"""`sketchconv serve`: an OpenAI-compatible server of one sketch and its tasks."""

from __future__ import annotations

import os
from typing import Any

import click

DELTA = "NAME=PATH"


def _deltas(_ctx: Any, _param: Any, given: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for one in given:
        name, equals, path = one.partition("=")
        if not (name and equals and path):
            raise click.BadParameter(f"expected {DELTA}, got {one!r}")
        if name in found:
            raise click.BadParameter(f"{name} is given twice")
        found[name] = path
    return found


@click.command("serve")
@click.argument("base", type=click.Path())
@click.option("--delta", "deltas", metavar=DELTA, multiple=True, callback=_deltas,
              help="A task's delta (file, folder or hub id) and the model name it gets; "
              "repeat for more.")  # fmt: skip
@click.option("--name", help="The base's model name. [default: that of its file]")
@click.option("--host", default="127.0.0.1", show_default=True,
              help="Address to listen on. At one of this machine alone, requests to other hosts "
              "than it and localhost are refused.")  # fmt: skip
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True,
              help="0 takes a free one.")  # fmt: skip
@click.option("--max-concurrent", type=click.IntRange(1), default=8, show_default=True,
              help="Answers under way at a time, of all tasks together, in one batch.")  # fmt: skip
@click.option("--max-queue", type=click.IntRange(0), default=64, show_default=True,
              help="Requests that may wait beyond these.")  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(1), default=1024, show_default=True,
              help="Tokens of an answer at most.")  # fmt: skip
@click.option("--max-prompt", type=click.IntRange(1), default=8192, show_default=True,
              help="Tokens of a prompt at most, within the model's positions.")  # fmt: skip
@click.option("--allow-host", "allowed", metavar="NAME", multiple=True,
              help="Another host that requests may name, such as a proxy's; repeat for more. All "
              "others are refused then, at any address.")  # fmt: skip
@click.option("--api-key-env", metavar="VARIABLE",
              help="Environment variable with the key that clients must send.")  # fmt: skip
@click.option("--threads", type=click.IntRange(1), help="CPU threads. [default: all cores]")
def command(
    base: str, deltas: dict[str, str], name: str | None, host: str, port: int, **options: Any
) -> None:
    """Serve the sketched model BASE, and each task's delta over it, by OpenAI's API.

    BASE is a file, a folder or a hub id. There are GET /v1/models, POST /v1/completions, POST
    /v1/chat/completions and GET /health. The member "model" of a request names the base or a task;
    requests of different tasks are computed together in one batch, over one copy of the base.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported; see `generate`
    from sketchconv.cli.generate import _silence
    from sketchconv.runtime.load import set_threads
    from sketchconv.serving import run
    from sketchconv.serving.service import Limits

    run.check_installed()
    key = _key(options["api_key_env"])
    if options["threads"] is not None:
        set_threads(options["threads"])
    _silence()
    place = run.listen(host, port)
    limits = Limits(options["max_concurrent"], options["max_queue"], options["max_tokens"],
                    options["max_prompt"])  # fmt: skip
    service = run.open_service(base, deltas, limits, name)
    if not run.is_loopback(host):
        click.echo(
            f"Warning: {host} can be reached from other machines, without encryption"
            + ("" if key else " and without a key (--api-key-env)"),
            err=True,
        )
    run.serve(service, place, key, lambda url: click.echo(
        f"Serving {', '.join(service.adapters)} on {url}/v1 (Ctrl-C ends it)", err=True
    ), run.hosts_of(place, host, options["allowed"]))  # fmt: skip


def _key(variable: str | None) -> str | None:
    from sketchconv.serving.run import check_key

    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise click.UsageError(f"--api-key-env: the variable {variable} is not set")
    check_key(key)
    return key
