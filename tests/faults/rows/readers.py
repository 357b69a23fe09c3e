"""Each kind of input, read as far as a user's command would read it."""

from __future__ import annotations

import signal
import struct
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
from sketchconv.formats.validate import validate
from sketchconv.recipe_file import load_recipe
from sketchconv.sources.checkpoint import CheckpointSource
from sketchconv.sources.gguf import GgufSource
from sketchconv.sources.gguf_blocks import GgufBlocks

SECONDS = 10  # of CPU time: a busy machine is no hang
WAIT = 120  # in all


class Hang(BaseException):
    """A reader took longer than `SECONDS`, or waited longer than `WAIT`."""


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


def same_as_decoder(path):
    """Read a sketch; what is taken decodes alike by the independent decoder, bit for bit."""
    read_sktch(path)
    file = toys.decoder().File(path)
    with SktchModel.open(path) as model:
        for name in model.manifest.sketches:
            theirs = b"".join(struct.pack(f"<{len(row)}f", *row) for row in file.rows(name))
            if theirs != model.decode(name).tobytes():
                raise ValueError(f"{name}: the independent decoder reads other values")


class _Base:
    """The base of a delta, as the independent decoder asks for it."""

    def __init__(self, table):
        self._table = table.tobytes()

    def check_digest(self, name):
        """It is the one that is known."""

    def read(self, name):
        """The only table."""
        return self._table


def read_delta(path):
    """Open, apply to the base's table as the independent decoder does, revert, validate."""
    base = toys.delta_base()
    with DeltaFile.open(path) as file:
        for name, record in file.document.weights.items():
            if (record.bound.shape, record.bound.lut) != (base.shape, "F16"):
                continue
            tuned = file.tuned(name, base)
            theirs = toys.decoder("decode_delta").Delta(path).tuned(name, _Base(base))
            if tuned.tobytes() != theirs:
                raise ValueError(f"{name}: the independent decoder gives another table")
            xor = file.document.coding.invertible
            if xor and file.reverted(name, tuned).tobytes() != base.tobytes():
                raise ValueError(f"{name}: reverting does not give the base back")
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


def gguf_alike(path):
    """Whether the `gguf` package finds the same tensors with the same values, bit for bit."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    theirs = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    blocks = GgufBlocks(path)
    try:
        if theirs.keys() != blocks.tensors.keys():
            raise ValueError("the gguf package finds other tensors")
        for name, info in blocks.tensors.items():
            rows = int(np.prod(info.shape[:-1], dtype=int))
            ours = blocks.float32(name, blocks.rows(name, 0, rows))
            with np.errstate(all="ignore"):
                wanted = dequantize(theirs[name].data, theirs[name].tensor_type)
            if not np.array_equal(ours.ravel(), wanted.astype(np.float32).ravel(), equal_nan=True):
                raise ValueError(f"{name}: the gguf package reads other values")
    finally:
        blocks.close()


READERS = {
    "sktch": read_sktch,
    "delta": read_delta,
    "checkpoint": read_checkpoint,
    "gguf": read_gguf,
    "recipe": load_recipe,
}


@contextmanager
def alarm():
    """Raise `Hang` in what takes too long; only in the main thread."""

    def ring(*_):
        raise Hang

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, SECONDS),
              signal.SIGALRM: (signal.ITIMER_REAL, WAIT)}  # fmt: skip
    old = {number: signal.signal(number, ring) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, old[number])


def attempt(reader, path):
    """The error of ours that a reader raised, None if it took the input, or a text for a failure.

    A failure is an error that is not ours, or a `Hang`.
    """
    try:
        with alarm():
            reader(path)
    except SketchconvError as error:
        return error
    except Hang:
        return f"no answer within {SECONDS} s"
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
