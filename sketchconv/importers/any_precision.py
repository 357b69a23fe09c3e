"""Any-Precision LLM checkpoints (Park et al., 2024): one model at several precisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from sketchconv.errors import SourceError
from sketchconv.formats.sketches import SketchRecord
from sketchconv.formats.tensors import U8Array
from sketchconv.importers.affine import check_integer
from sketchconv.importers.base import Carrier, Checkpoint, ImportOptions, Weight, record_of

_LANES: Final = 32
_WORD: Final = 4


@dataclass(frozen=True, slots=True)
class PlaneWeight:
    """One module: ``qweight`` int32 [parent, out, in/32], a bit plane for each bit of an index from
    the highest down, and ``lut{b}`` float16 [out, 2^b] for every precision b.

    Attributes:
        parts: the planes, and the tables of all precisions.
    """

    checkpoint: Checkpoint
    stem: str
    record: SketchRecord
    parts: tuple[str, ...]

    def rows(self, begin: int, end: int) -> tuple[U8Array, Carrier]:
        """Indices and tables of rows [begin, end); see `importers.base.Weight`."""
        bits, width = self.record.bits, self.record.shape[1]
        order = stored_bytes(width // 8)
        codes = np.zeros((end - begin, width), np.uint8)
        for plane in range(bits):
            codes <<= np.uint8(1)
            codes |= np.unpackbits(self._plane(plane, begin, end)[:, order], axis=1)
        return codes, self.checkpoint.rows(f"{self.stem}.lut{bits}", begin, end)[:, None]

    def _plane(self, plane: int, begin: int, end: int) -> U8Array:
        """Bytes ``[end - begin, in / 8]`` of one plane as they are stored."""
        height, width = self.record.shape
        first = (plane * height + begin) * (width // 8)
        size = (end - begin) * (width // 8)
        raw = self.checkpoint.store.read(f"{self.stem}.qweight", first, first + size)
        return np.frombuffer(raw, np.uint8).reshape(end - begin, -1)


def stored_bytes(count: int) -> npt.NDArray[np.int64]:
    """Where each byte of a row of bits stands in the file.

    Rows are cut into warps of 32 lanes with one word each (the last may have fewer lanes). Byte b
    of a warp belongs to lane ``b % lanes`` and is byte ``3 - b // lanes`` of its word, since the
    bits of a byte and the bytes of a word both run from the highest down.

    Args:
        count: bytes of a row, a multiple of 4.
    """
    found = np.empty(count, np.int64)
    for first in range(0, count, _LANES * _WORD):
        size = min(_LANES * _WORD, count - first)
        byte, lane = np.divmod(np.arange(size), size // _WORD)
        found[first : first + size] = first + lane * _WORD + (_WORD - 1 - byte)
    return found


class AnyPrecision:
    """Nested tables per row, ``W[r, c] = lut{b}[r, q[r, c] >> (parent - b)]`` in float16.

    Layout followed: Any-Precision LLM's repository of July 2025 (commit a3257d0), `pack.py`: bit
    planes in the order of a warp's lanes, `config.json` with `anyprec`, published as
    `pytorch_model.bin` (read by `importers.unpickle`, which runs nothing) or as safetensors.
    """

    name = "anyprec"
    layout = "Any-Precision LLM, qweight planes and lut3 to lut8"
    formula = "lut[row, highest bits of q], in float16"
    complete = True

    def matches(self, checkpoint: Checkpoint) -> bool:
        """Whether the config says so."""
        return "anyprec" in checkpoint.config

    def weights(self, checkpoint: Checkpoint, options: ImportOptions) -> Sequence[Weight]:
        """Every module with a `qweight`, at one precision; see `importers.base.Importer`."""
        settings, where = checkpoint.config.get("anyprec"), f"{checkpoint.id}: anyprec"
        if not isinstance(settings, dict):
            raise SourceError(f"{where}: expected an object in config.json")
        seed = check_integer(settings.get("seed_precision"), "seed_precision", where)
        parent = check_integer(settings.get("parent_precision"), "parent_precision", where)
        if not 1 <= seed <= parent <= 8 or settings.get("group_count", 1) != 1:
            raise SourceError(f"{where}: precisions {seed} to {parent}, one group per row expected")
        bits = parent if options.bits is None else options.bits
        if not seed <= bits <= parent:
            raise SourceError(f"{where}: has {seed} to {parent} bits, not {bits}; pass --bits")
        known = range(seed, parent + 1)
        return [_weight(checkpoint, s, bits, known) for s in checkpoint.stems(".qweight")]


def _weight(checkpoint: Checkpoint, stem: str, bits: int, known: range) -> PlaneWeight:
    planes = checkpoint.info(f"{stem}.qweight", dtypes=("I32",), rank=3)
    parent, height, words = planes.shape
    if parent != known[-1] or not height or not words:
        raise SourceError(
            f"{checkpoint.id}: {stem}.qweight: shape {list(planes.shape)}, expected {known[-1]}"
            " planes"
        )
    for precision in known:
        checkpoint.expect(f"{stem}.lut{precision}", (height, 1 << precision), dtypes=("F16",))
    parts = (f"{stem}.qweight", *(f"{stem}.lut{precision}" for precision in known))
    return PlaneWeight(
        checkpoint, stem, record_of(stem, (height, words * 32), bits, 1, "F16"), parts
    )
