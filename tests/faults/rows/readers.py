"""Each kind of input, read as far as a user's command would read it."""

from __future__ import annotations

import signal
from contextlib import contextmanager

import numpy as np

from rows import toys
from sketchconv.architecture import map_model
from sketchconv.errors import SketchconvError
from sketchconv.export.recipe import ExportRecipe
from sketchconv.export.reexport import from_gguf
from sketchconv.formats.delta import DeltaFile
from sketchconv.formats.delta_validate import validate_delta
from sketchconv.formats.reader import SktchModel
from sketchconv.formats.tensors import DTYPES
from sketchconv.formats.validate import validate
from sketchconv.recipe_file import load_recipe
from sketchconv.sources.checkpoint import CheckpointSource
from sketchconv.sources.gguf import GgufSource
from sketchconv.sources.gguf_blocks import GgufBlocks

SECONDS = 10.0


class Hang(BaseException):
    """A reader took longer than `SECONDS`."""


def read_sktch(path):
    """Open, decode every weight, read every tensor, validate."""
    with SktchModel.open(path) as model:
        for name in model.manifest.sketches:
            model.decode(name)
        for name in model.tensors:
            model.read(name)
        for name in model.files:
            model.file(name)
    found = list(validate(path))
    if found:
        raise SketchconvError(str(found[0]))


def read_delta(path):
    """Open, apply to tables of ones, validate."""
    with DeltaFile.open(path) as file:
        for name, record in file.document.weights.items():
            if np.prod(record.bound.shape, dtype=object) < 1 << 22:
                file.tuned(name, np.ones(record.bound.shape, DTYPES[record.bound.lut].numpy))
    found = list(validate_delta(path))
    if found:
        raise SketchconvError(str(found[0]))


def read_checkpoint(path):
    """Open a folder, map its model, read every row and every file beside the weights."""
    with CheckpointSource(path) as source:
        map_model(source.config(), source.infos)
        for name, info in source.infos.items():
            source.rows(name, 0, info.shape[0] if info.shape else 1)
        source.files()


def read_gguf(path):
    """Plan a re-export, read and dequantize every row, then open as a model."""
    reader, _ = from_gguf(path, ExportRecipe("Q8_0"))
    reader.close()
    blocks = GgufBlocks(path)
    try:
        for name, info in blocks.tensors.items():
            rows = int(np.prod(info.shape[:-1], dtype=int))
            blocks.float32(name, blocks.rows(name, 0, rows))
    finally:
        blocks.close()
    with GgufSource(path) as source:
        source.config()
        source.files()


READERS = {
    "sktch": read_sktch,
    "delta": read_delta,
    "checkpoint": read_checkpoint,
    "gguf": read_gguf,
    "recipe": load_recipe,
}


@contextmanager
def alarm(seconds=SECONDS):
    """Raise `Hang` in what takes too long; only in the main thread."""

    def ring(*_):
        raise Hang

    old = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def attempt(reader, path):
    """The error of ours that a reader raised, None if it took the input, or a text for a failure.

    A failure is an error that is not ours, or none within `SECONDS`.
    """
    try:
        with alarm():
            reader(path)
    except SketchconvError as error:
        return error
    except Hang:
        return f"no answer within {SECONDS:.0f} s"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


def warm(folder):
    """Read good inputs, which must be taken; imports what an alarm must not interrupt."""
    read_checkpoint(toys.llama(folder / "model"))
    read_sktch(toys.toys().make_toy(rows=2, columns=6, groups=2).bundle(folder / "good.sktch"))
    found = list(validate_delta(toys.delta(folder / "good-delta.sktch")))
    if found:
        raise ValueError(str(found[0]))
