"""SqueezeLLM checkpoints (Kim et al., 2024): a table per row, indices in 32-bit words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sketchconv.errors import SourceError
from sketchconv.formats.sketches import SketchRecord
from sketchconv.formats.tensors import U8Array
from sketchconv.importers.base import (
    Carrier,
    Checkpoint,
    ImportOptions,
    Weight,
    bits_of,
    record_of,
)
from sketchconv.importers.words import indices_of_columns, packed_rows

_SPARSE: Final = ("rows", "cols", "vals", "full_rows", "full_row_indices", "startrows")


@dataclass(frozen=True, slots=True)
class SqueezeWeight:
    """One module: ``qweight`` int32 [in*b/32, out] and ``lookup_table`` [out, 2^b]."""

    checkpoint: Checkpoint
    stem: str
    record: SketchRecord

    @property
    def parts(self) -> tuple[str, ...]:
        """Both tensors."""
        return (f"{self.stem}.qweight", f"{self.stem}.lookup_table")

    def rows(self, begin: int, end: int) -> tuple[U8Array, Carrier]:
        """Indices and tables of rows [begin, end); see `importers.base.Weight`."""
        qweight, table = self.parts
        codes = indices_of_columns(self.checkpoint, qweight, self.record.bits, begin, end)
        return codes, self.checkpoint.rows(table, begin, end)[:, None]


class SqueezeLlm:
    """Non-uniform levels per row, ``W[r, c] = lookup_table[r, q[r, c]]`` in float32.

    Layout followed: SqueezeLLM's repository of March 2024 (commit a5fd71f), `QuantLinearLUT.pack2`:
    3 and 4 bits, words as GPTQ packs them. Published as `.pt` (read by `importers.unpickle`,
    which runs nothing), with config and tokenizer of the base model. A sparse part beside the
    tables has no place in a sketch and is refused.
    """

    name = "squeezellm"
    layout = "SqueezeLLM, qweight lookup_table, without a sparse part"
    formula = "lookup_table[row, q], in float32 as the tables are stored"
    complete = True

    def matches(self, checkpoint: Checkpoint) -> bool:
        """Whether there are tables by that name."""
        return bool(checkpoint.stems(".lookup_table"))

    def weights(self, checkpoint: Checkpoint, options: ImportOptions) -> Sequence[Weight]:
        """Every module with a `lookup_table`; see `importers.base.Importer`."""
        stems = {*checkpoint.stems(".lookup_table"), *checkpoint.stems(".qweight")}
        return [_weight(checkpoint, stem) for stem in sorted(stems)]


def _weight(checkpoint: Checkpoint, stem: str) -> SqueezeWeight:
    sparse = next((leaf for leaf in _SPARSE if checkpoint.has(f"{stem}.{leaf}")), None)
    if sparse is not None:
        raise SourceError(
            f"{checkpoint.id}: {stem}.{sparse}: a dense-and-sparse weight; a sketch has no sparse"
            " part. Take the checkpoint without one (s0), or convert the dense model"
        )
    table = checkpoint.info(f"{stem}.lookup_table", dtypes=("F32", "F16"), rank=2)
    words = checkpoint.info(f"{stem}.qweight", dtypes=("I32",), rank=2)
    bits = bits_of(table.shape[1], f"{checkpoint.id}: {stem}.lookup_table")
    width = words.shape[0] * 32 // bits
    where = f"{checkpoint.id}: {stem}.qweight"
    if bits not in (3, 4) or not width or packed_rows(bits, width, where) != words.shape[0]:
        raise SourceError(f"{where}: {words.shape[0]} rows of words at {bits} bits; 3 or 4 bits")
    if words.shape[1] != table.shape[0]:
        raise SourceError(f"{where}: {words.shape[1]} columns, but {table.shape[0]} tables")
    return SqueezeWeight(
        checkpoint, stem, record_of(stem, (table.shape[0], width), bits, 1, table.dtype)
    )
