"""`sketchconv delta`: task deltas, the changed lookup tables of a sketch alone."""

from __future__ import annotations

import click

from sketchconv.cli.lazy import LazyGroup

# name -> module, one line of help; a command whose module is not installed is not listed.
_COMMANDS = {
    "create": ("sketchconv.cli.delta_create", "Make a delta from a base and a tuned sketch."),
    "extract": ("sketchconv.cli.delta_extract", "Make a delta from a tuned dense checkpoint."),
    "apply": ("sketchconv.cli.delta_apply", "Write the sketch that a delta makes of its base."),
    "revert": ("sketchconv.cli.delta_revert", "Take a delta back: the base's own bytes again."),
    "merge": ("sketchconv.cli.delta_merge", "Make one delta of several, by weights."),
    "info": ("sketchconv.cli.delta_info", "Show what a delta holds and what it is bound to."),
    "analyze": ("sketchconv.cli.delta_analyze", "Compare low rank and sketches on an update."),
    "export": ("sketchconv.cli.delta_export", "Write a delta as LoRA, GGUF or safetensors."),
}


@click.group("delta", cls=LazyGroup, lazy=_COMMANDS)
def command() -> None:
    """Task deltas: a few megabytes of changed lookup tables, bound to one base sketch.

    A delta is a .sktch file, or a folder with sketch_adapter.safetensors.
    """
