"""GPTQ checkpoints (Frantar et al., 2023) in the layout of AutoGPTQ and GPTQModel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sketchconv.errors import SourceError
from sketchconv.formats.sketches import SketchRecord
from sketchconv.formats.tensors import U8Array
from sketchconv.importers.affine import SCALES, affine_tables, check_integer
from sketchconv.importers.base import Carrier, Checkpoint, ImportOptions, Weight, record_of
from sketchconv.importers.words import WIDTHS, indices_of_columns, packed_rows, unpack_words

# Shorter runs than this make a sketch of 4 bits larger than the dense weight.
_SHORTEST = 32
_ELSEWHERE = "dequantize it with its own tool, and convert the dense result"


@dataclass(frozen=True, slots=True)
class GptqWeight:
    """One module: ``qweight`` int32 [in*b/32, out], ``qzeros`` int32 [G', out*b/32], ``scales``
    [G', out] and ``g_idx`` int32 [in], the row of scales that each column uses.

    Attributes:
        rows_of_scales: for each group of the sketch, the row of `scales` and `qzeros`.
        offset: what is added to stored zeros: 1 in the first version of the format, else 0.
    """

    checkpoint: Checkpoint
    stem: str
    record: SketchRecord
    parts: tuple[str, ...]
    rows_of_scales: npt.NDArray[np.int64]
    offset: int

    def rows(self, begin: int, end: int) -> tuple[U8Array, Carrier]:
        """Indices and tables of rows [begin, end); see `importers.base.Weight`."""
        bits = self.record.bits
        codes = indices_of_columns(self.checkpoint, f"{self.stem}.qweight", bits, begin, end)
        packed = self.checkpoint.array(f"{self.stem}.qzeros")
        zeros = unpack_words(packed, bits).T[begin:end]
        scales = self.checkpoint.array(f"{self.stem}.scales").T[begin:end]
        found = zeros.astype(np.int32) + self.offset
        at = self.rows_of_scales
        return codes, affine_tables(scales[:, at], found[:, at], bits, self.record.lut_dtype)


class Gptq:
    """Affine grids per group of columns, ``W = scales[g] * (q - zeros[g])``.

    Layout followed: AutoGPTQ 0.8 (`qlinear_cuda.py`) and GPTQModel 7.3.4
    (`PackableQuantLinear.dequantize_weight`): words filled from the lowest bit up, zeros stored
    less one in format `gptq`, as they are in `gptq_v2`. 2, 3, 4 and 8 bits.

    The peer's formula is that of its torch kernel: difference in integers, product in the dtype of
    the scales (float16 as a rule), rounded once.
    """

    name = "gptq"
    layout = "AutoGPTQ 0.8 / GPTQModel 7.3.4, qweight qzeros scales g_idx"
    formula = "scales * (q - zeros) in the dtype of the scales"
    complete = True

    def matches(self, checkpoint: Checkpoint) -> bool:
        """Whether config or names are GPTQ's."""
        method = checkpoint.quantization.get("quant_method")
        if method is not None:
            return bool(method == "gptq")
        return any(checkpoint.has(f"{stem}.g_idx") for stem in checkpoint.stems(".qweight"))

    def weights(self, checkpoint: Checkpoint, options: ImportOptions) -> Sequence[Weight]:
        """Every module with a `qweight`; see `importers.base.Importer`."""
        offset = _zero_offset(checkpoint)
        return [_weight(checkpoint, stem, offset) for stem in checkpoint.stems(".qweight")]


def _zero_offset(checkpoint: Checkpoint) -> int:
    settings = checkpoint.quantization
    kind = settings.get("checkpoint_format", settings.get("format", "gptq"))
    if kind not in ("gptq", "gptq_v2"):
        raise SourceError(
            f"{checkpoint.id}: GPTQ in the format {kind!r}; gptq and gptq_v2 are known;"
            f" {_ELSEWHERE}"
        )
    return 1 if kind == "gptq" else 0


def _weight(checkpoint: Checkpoint, stem: str, offset: int) -> GptqWeight:
    words = checkpoint.info(f"{stem}.qweight", dtypes=("I32",), rank=2)
    scales = checkpoint.info(f"{stem}.scales", dtypes=SCALES, rank=2)
    groups, height = scales.shape
    g_idx = _group_of_columns(checkpoint, stem, groups)
    width = len(g_idx)
    bits = words.shape[0] * 32 // width
    if bits not in WIDTHS or words.shape != (packed_rows(bits, width, stem), height):
        raise SourceError(
            f"{checkpoint.id}: {stem}.qweight: shape {list(words.shape)} is that of no width of"
            f" {WIDTHS} bits for a weight of {[height, width]}"
        )
    packed = packed_rows(bits, height, f"{checkpoint.id}: {stem}.qzeros")
    checkpoint.expect(f"{stem}.qzeros", (groups, packed), dtypes=("I32",))
    size = _run(g_idx)
    _refuse_scattered(checkpoint, stem, g_idx, groups)
    if offset:
        _refuse_ambiguous(checkpoint, stem, bits)
    parts = [f"{stem}.{leaf}" for leaf in ("qweight", "qzeros", "scales", "g_idx")]
    return GptqWeight(
        checkpoint,
        stem,
        record_of(stem, (height, width), bits, width // size, scales.dtype),
        tuple(part for part in parts if checkpoint.has(part)),
        g_idx[::size].astype(np.int64),
        offset,
    )


def _group_of_columns(checkpoint: Checkpoint, stem: str, groups: int) -> npt.NDArray[np.int64]:
    """The row of scales that each column uses."""
    name = f"{stem}.g_idx"
    if not checkpoint.has(name):
        return _even_groups(checkpoint, stem, groups)
    checkpoint.info(name, dtypes=("I32", "I64"), rank=1)
    found = checkpoint.array(name).astype(np.int64)
    if not len(found) or found.min() < 0 or found.max() >= groups:
        raise SourceError(f"{checkpoint.id}: {name}: groups outside 0 to {groups - 1}")
    return found


def _even_groups(checkpoint: Checkpoint, stem: str, groups: int) -> npt.NDArray[np.int64]:
    where = f"{checkpoint.id}: {stem}.qweight"
    bits = check_integer(checkpoint.quantization.get("bits"), "bits", where)
    if bits not in WIDTHS:
        raise SourceError(f"{where}: {bits} bits; {WIDTHS} are known")
    width = checkpoint.store.infos[f"{stem}.qweight"].shape[0] * 32 // bits
    size = check_integer(checkpoint.quantization.get("group_size"), "group_size", where)
    size = width if size == -1 else size
    if size < 1 or -(-width // size) != groups:
        raise SourceError(
            f"{where}: {width} columns in groups of {size} are not the {groups} of its scales"
        )
    return np.arange(width, dtype=np.int64) // size


def _run(g_idx: npt.NDArray[np.int64]) -> int:
    """Columns of the longest groups of one length that each use one row of scales."""
    changes = np.flatnonzero(np.diff(g_idx)) + 1
    return math.gcd(len(g_idx), *changes.tolist())


def _refuse_scattered(
    checkpoint: Checkpoint, stem: str, g_idx: npt.NDArray[np.int64], groups: int
) -> None:
    """Refuse act-order: columns of one group that do not stand together.

    A sketch's groups are runs of columns, and its format has no permutation of them.
    """
    runs = 1 + np.count_nonzero(np.diff(g_idx))
    if runs > groups and _run(g_idx) < _SHORTEST:
        raise SourceError(
            f"{checkpoint.id}: {stem}.g_idx: the columns of a group do not stand together (act"
            " order, desc_act without static groups), and a sketch's groups are runs of columns;"
            f" {_ELSEWHERE}"
        )


def _refuse_ambiguous(checkpoint: Checkpoint, stem: str, bits: int) -> None:
    """Refuse zeros that cannot be one more than what is stored.

    The peer's kernels do not agree on them: one reads 2**b (`qlinear_cuda`), one 0
    (`qlinear_cuda_old`), and one adds to whole words, so that the next zero changes too.
    """
    highest = (1 << bits) - 1
    if (unpack_words(checkpoint.array(f"{stem}.qzeros"), bits) == highest).any():
        raise SourceError(
            f"{checkpoint.id}: {stem}.qzeros: a stored zero of {highest}, which kernels of this"
            " version read in different ways, so that no one formula is the peer's; save it as"
            f" gptq_v2, or {_ELSEWHERE}"
        )
