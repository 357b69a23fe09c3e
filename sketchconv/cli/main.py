"""The `sketchconv` command: its group, its error handling, its exit codes."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import IO, Any

import click

from sketchconv import __version__
from sketchconv.cli.lazy import LazyGroup
from sketchconv.errors import SketchconvError, Suspended

# name -> module, one line of help: commands are imported when they are used.
_COMMANDS = {
    "convert": ("sketchconv.cli.convert", "Compress a checkpoint into a sketch."),
    "inspect": ("sketchconv.cli.inspect", "Show what a model file or folder holds."),
    "verify": ("sketchconv.cli.verify", "Check every digest and every rule of a sketch."),
    "eval": ("sketchconv.cli.eval", "Measure models: perplexity, KL to a reference, questions."),
    "tune": ("sketchconv.cli.tune", "Fine-tune a sketch's LUTs on a task; write a delta."),
    "generate": ("sketchconv.cli.generate", "Write text with a sketched language model."),
    "delta": ("sketchconv.cli.delta", "Make, apply, revert and merge task deltas."),
    "push": ("sketchconv.cli.push", "Publish models, deltas and GGUF files on the Hub."),
    "serve": ("sketchconv.cli.serve", "Serve a sketch and its task deltas by OpenAI's API."),
    "doctor": ("sketchconv.cli.doctor", "Show which kernels run here and why; test them."),
}

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130
EXIT_SUSPENDED = 75  # EX_TEMPFAIL: the same command will go on


class _SuspendedRun(click.ClickException):
    """An interrupt that left finished work."""

    exit_code = EXIT_SUSPENDED

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"Interrupted: {self.message}.", file=file, err=True)


class _Root(LazyGroup):
    """The whole command line: our errors become one line each."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SketchconvError as error:
            raise click.ClickException(str(error)) from error
        except Suspended as error:  # click would make a plain Abort of it
            raise _SuspendedRun(str(error)) from None
        except BrokenPipeError:
            raise
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(f"{place}{error.strerror or error}") from error


@click.group(cls=_Root, lazy=_COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sketchconv")
def cli() -> None:
    """Compress models into lookup-table sketches, inspect, verify and run them."""


def run() -> None:
    """Entry point: run the command line and exit with its code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("Interrupted: no output was written, and nothing is kept.", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has gone (for instance `| head`); point stdout at nothing so
        # that the interpreter's own flush at exit stays silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_ERROR)
    except MemoryError:
        click.echo("Error: out of memory; try --max-memory or a machine with more", err=True)
        sys.exit(EXIT_ERROR)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
