"""`sketchconv generate`: stream text from a sketched language model."""

from __future__ import annotations

import os
import time
from typing import Any

import click

NOT_WANTED = "transformers' loop, as asked"


@click.command("generate")
@click.argument("model", type=click.Path())
@click.argument("prompt")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=200, show_default=True)
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="0 always takes the most likely token.",
)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the sampling.")
@click.option("--chat/--no-chat", default=None, help="Use the chat template. [default: if any]")
@click.option("--system", help="System message of the chat.")
@click.option(
    "--own-loop/--no-own-loop",
    default=True,
    show_default=True,
    help="Decode with sketchconv's compiled loop where the model allows it.",
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads. [default: all cores]")
def command(
    model: str,
    prompt: str,
    *,
    revision: str | None,
    threads: int | None,
    own_loop: bool,
    **options: Any,
) -> None:
    """Continue PROMPT with the sketched MODEL (a .sktch file, a folder or a hub id)."""
    # Before torch is imported. OpenMP's idle threads otherwise spin on cores that the kernels need:
    # SmolLM2 on 2 threads of 2 busy cores wrote 3.8 tokens/s with spinning, 17.3 without.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from sketchconv.hub.fetching import fetch
    from sketchconv.runtime.decoder import describe
    from sketchconv.runtime.generate import Pace, stream
    from sketchconv.runtime.load import load, load_tokenizer, set_threads

    if threads is not None:
        set_threads(threads)
    _silence()
    started = time.perf_counter()
    path = fetch(model, revision)
    tokenizer = load_tokenizer(path)
    network = load(path)
    loaded = time.perf_counter()
    pace = Pace()
    for piece in stream(network, tokenizer, prompt, own_loop=own_loop, pace=pace, **options):
        click.echo(piece, nl=False)
    click.echo()
    click.echo(
        f"loaded in {loaded - started:.1f} s; prompt read (and, the first time, kernels compiled) "
        f"in {pace.first - loaded:.1f} s; {pace.tokens} tokens at {pace.per_second:.1f} tokens/s "
        f"({describe(network) if own_loop else NOT_WANTED})",
        err=True,
    )


def _silence() -> None:
    """No progress bar of the weights: they are there in a second, and stdout is for the text."""
    from transformers.utils import logging

    disable: Any = logging.disable_progress_bar
    disable()
