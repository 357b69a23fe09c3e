"""AWQ checkpoints (Lin et al., 2024) in the GEMM layout of AutoAWQ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from sketchconv.errors import SourceError
from sketchconv.formats.sketches import SketchRecord
from sketchconv.formats.tensors import U8Array
from sketchconv.importers.affine import affine_tables
from sketchconv.importers.base import Carrier, Checkpoint, ImportOptions, Weight, record_of

_BITS: Final = 4
_PER_WORD: Final = 8
# Field of a word (from its lowest bits) that holds output 0, 1, ... 7 of its eight.
_FIELDS: Final = (0, 4, 1, 5, 2, 6, 3, 7)
_PIECE: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class AwqWeight:
    """One module: ``qweight`` int32 [in, out/8], ``qzeros`` int32 [G, out/8], ``scales`` [G, out];
    words run along the outputs."""

    checkpoint: Checkpoint
    stem: str
    record: SketchRecord
    parts: tuple[str, ...]

    def rows(self, begin: int, end: int) -> tuple[U8Array, Carrier]:
        """Indices and tables of rows [begin, end); see `importers.base.Weight`."""
        codes = self._outputs("qweight", begin, end)
        zeros = self._outputs("qzeros", begin, end)
        scales = self.checkpoint.array(f"{self.stem}.scales").T[begin:end]
        return codes, affine_tables(scales, zeros, _BITS, self.record.lut_dtype)

    def _outputs(self, leaf: str, begin: int, end: int) -> U8Array:
        """Fields uint8 ``[end - begin, rows of the tensor]`` of outputs [begin, end)."""
        name = f"{self.stem}.{leaf}"
        height, width = self.checkpoint.store.infos[name].shape
        first, last = begin // _PER_WORD, -(-end // _PER_WORD)
        out = np.empty(((last - first) * _PER_WORD, height), np.uint8)
        step = max(1, _PIECE // (4 * width))
        for at in range(0, height, step):
            words = self.checkpoint.rows(name, at, min(at + step, height))[:, first:last]
            turned = np.ascontiguousarray(words.T).view(np.uint32)
            for place, field in enumerate(_FIELDS):
                found = turned >> np.uint32(_BITS * field) & np.uint32(15)
                out[place::_PER_WORD, at : at + len(words)] = found
        return out[begin - first * _PER_WORD : end - first * _PER_WORD]


class Awq:
    """Affine grids per group of columns, ``W = (q - zeros[g]) * scales[g]``.

    Layout followed: AutoAWQ 0.2.9, `WQLinear_GEMM` and `dequantize_gemm`: 4 bits, eight outputs in
    a word in the order 0 2 4 6 1 3 5 7. Difference in integers, product in the dtype of the scales
    (float16), rounded once.
    """

    name = "awq"
    layout = "AutoAWQ 0.2.9, version gemm"
    formula = "(q - zeros) * scales in the dtype of the scales"
    complete = True

    def matches(self, checkpoint: Checkpoint) -> bool:
        """Whether the config is AWQ's; by names alone it cannot be told from others."""
        settings = checkpoint.quantization
        return settings.get("quant_method") == "awq" or "w_bit" in settings

    def weights(self, checkpoint: Checkpoint, options: ImportOptions) -> Sequence[Weight]:
        """Every module with a `qweight`; see `importers.base.Importer`."""
        settings = checkpoint.quantization
        version = str(settings.get("version", settings.get("format", "gemm"))).lower()
        if version != "gemm":
            raise SourceError(
                f"{checkpoint.id}: AWQ in the layout {version!r}; only gemm is known. Save it in"
                " that layout, or dequantize it with its own tool and convert the dense result"
            )
        stems = checkpoint.stems(".qweight")
        known = {f"{stem}.scales" for stem in stems}
        odd = [n for n in checkpoint.store.infos if n.endswith(".scales") and n not in known]
        if odd:
            raise SourceError(
                f"{checkpoint.id}: {odd[0]}: scales of an activation, which have no place in the"
                " model; dequantize it with its own tool and convert the dense result"
            )
        return [_weight(checkpoint, stem) for stem in stems]


def _weight(checkpoint: Checkpoint, stem: str) -> AwqWeight:
    words = checkpoint.info(f"{stem}.qweight", dtypes=("I32",), rank=2)
    width, height = words.shape[0], words.shape[1] * _PER_WORD
    scales = checkpoint.info(f"{stem}.scales", dtypes=("F16", "BF16"), rank=2)
    groups = scales.shape[0]
    checkpoint.expect(f"{stem}.scales", (groups, height), dtypes=("F16", "BF16"))
    checkpoint.expect(f"{stem}.qzeros", (groups, words.shape[1]), dtypes=("I32",))
    if groups < 1 or width % groups:
        raise SourceError(
            f"{checkpoint.id}: {stem}.scales: {groups} groups do not divide {width} columns"
        )
    _check_settings(checkpoint, stem, width // groups, width)
    record = record_of(stem, (height, width), _BITS, groups, scales.dtype)
    parts = tuple(f"{stem}.{leaf}" for leaf in ("qweight", "qzeros", "scales"))
    return AwqWeight(checkpoint, stem, record, parts)


def _check_settings(checkpoint: Checkpoint, stem: str, size: int, width: int) -> None:
    settings = checkpoint.quantization
    bits = settings.get("bits", settings.get("w_bit", _BITS))
    if bits != _BITS:
        raise SourceError(f"{checkpoint.id}: AWQ of {bits!r} bits; only 4 are known")
    asked = settings.get("group_size", settings.get("q_group_size"))
    if asked not in (None, size) and not (asked == -1 and size == width):
        raise SourceError(
            f"{checkpoint.id}: {stem}.scales: groups of {size} columns, but the config says {asked}"
        )
