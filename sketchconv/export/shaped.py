"""Shaped sketches as GGUF blocks: the same codes and scales, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sketchconv.export.plan import ExportStep
from sketchconv.formats.packing import unpack
from sketchconv.formats.sketches import SketchRecord
from sketchconv.kernels.ggml.shaped import GRIDS, Shaped, key_of, pack
from sketchconv.sources.base import Source
from sketchconv.sources.sketch import SketchSource, split_rows

KEPT_ROWS = frozenset({"none", "rotary_q", "rotary_k"})
"""Changes of an export that leave rows as they are, or only reorder them."""


def block_types(source: Source) -> dict[str, str]:
    """The GGUF type of each shaped sketch of a source, by its name."""
    if not isinstance(source, SketchSource):
        return {}
    return {
        name: GRIDS[key_of(record.grid, record.bits)].kind
        for name, record in source.records.items()
        if record.shaped
    }


def packed_blocks(source: Source, step: ExportStep, begin: int, end: int) -> bytes:
    """Rows [begin, end) of the output as blocks, taken from the sketch's codes and scales.

    Raises:
        TypeError: the step's tensor is no shaped sketch.
        SourceError: the file has become shorter.
    """
    from sketchconv.export.rows import rotary_order, span

    record = _record(source, step.source)
    first, last = span(step, begin, end)
    index, table = split_rows(record, source.rows(record.name, first, last))
    if step.change != "none":
        order = rotary_order(np.arange(begin - first, end - first), step.head_rows)
        index, table = index[order], table[order]
    codes = unpack(index, record.bits, record.group_size).reshape(len(index), -1)
    minimum = table[..., 1] if table.shape[-1] > 1 else None
    found = Shaped(codes, table[..., 0], minimum)
    return pack(found, key_of(record.grid, record.bits)).tobytes()


def _record(source: Source, name: str | None) -> SketchRecord:
    records: Mapping[str, SketchRecord] = source.records if isinstance(source, SketchSource) else {}
    if name is None or name not in records or not records[name].shaped:
        raise TypeError(f"{name}: {source.format} rows are not blocks of GGUF")
    return records[name]
