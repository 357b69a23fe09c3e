"""A Hugging Face folder whose weights are 8-bit floats with scales beside them, read as dense."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from sketchconv.errors import SourceError
from sketchconv.formats.tensors import TensorInfo
from sketchconv.sources.base import Float32
from sketchconv.sources.checkpoint import CheckpointSource
from sketchconv.sources.config import (
    MAX_CONFIG_BYTES,
    dump_json,
    quantized_by,
    read_limited,
    refuse_quantized_names,
)
from sketchconv.sources.folder import ModelFolder
from sketchconv.sources.fp8_scheme import FP8_METHODS, Fp8Scheme, split_config
from sketchconv.sources.fp8_values import Scales
from sketchconv.sources.values import stored_info

_WEIGHT: Final = ".weight"
_CODES: Final = "F8_E4M3"
_SCALES: Final = ("F32", "BF16", "F16")
# Scales of activations and of the cache, one value each: no part of any weight.
_OTHERS: Final = (
    *(".input_scale", ".activation_scale", ".output_scale"),
    *(".q_scale", ".k_scale", ".v_scale"),
)


def says_fp8(path: Path) -> bool:
    """Whether a folder's config may be that of 8-bit floats."""
    folder = ModelFolder(path)
    if not folder.has("config.json"):
        return False
    try:
        data = read_limited(folder.path("config.json"), MAX_CONFIG_BYTES)
    except SourceError:
        return False  # Opening it as a checkpoint says what is wrong.
    return quantized_by(data) in FP8_METHODS


class Fp8Checkpoint(CheckpointSource):
    """A checkpoint of float8_e4m3fn weights with scales: per block, row or tensor.

    Such a weight is dense and F32 in `infos`: its values are code times scale in float32. `rows`
    gives for each row its codes, its scales and the columns that share one. Scales have no names of
    their own here, and those of activations and of the cache are left out. All else is as in a
    `CheckpointSource`.

    Raises:
        SourceError: also a scheme that is not known, a weight without scales or with scales of
            another shape or dtype, and scales without a weight; names the tensor.
    """

    format = "fp8"

    def _parse(self, data: bytes, where: str) -> dict[str, Any]:
        config, self._scheme = split_config(data, where)
        return config

    def _stored_infos(self) -> dict[str, TensorInfo]:
        known = {name: info for name, (_, info) in self._tensors.items()}
        self._scales = dict(_paired(known, self._scheme, self.id))
        hidden = {scales.name for scales in self._scales.values()}
        hidden |= {n for n, i in known.items() if n.endswith(_OTHERS) and i.count == 1}
        left = [name for name in known if name not in hidden]
        _refuse_left(left, self._scales, self.id)
        return {name: self._dense(known[name]) for name in left}

    def _dense(self, info: TensorInfo) -> TensorInfo:
        if info.name in self._scales:
            return TensorInfo(info.name, "F32", info.shape)
        return stored_info(info, self.id)

    def rows(self, name: str, begin: int, end: int) -> bytes:
        """Rows [begin, end): of a scaled weight see `Scales.beside`."""
        raw, scales = super().rows(name, begin, end), self._scales.get(name)
        if scales is None or begin == end:
            return raw
        first, last = scales.span(begin, end)
        return scales.beside(
            raw, self._tensor(scales.name)[0].read(scales.name, first, last), begin
        )

    def float32(self, name: str, raw: bytes) -> Float32:
        """The values of `raw` as float32; of a scaled weight code times scale, rounded once."""
        scales = self._scales.get(name)
        return super().float32(name, raw) if scales is None else scales.values(raw)

    def stored(self, name: str, raw: bytes) -> bytes:
        """`raw` in the dtype of `infos`: F32 for a scaled weight."""
        if name in self._scales:
            return self.float32(name, raw).astype("<f4", copy=False).tobytes()
        return super().stored(name, raw)

    def files(self) -> dict[str, bytes]:
        """The folder's allowlisted files, with the dense model's config."""
        return {**super().files(), "config.json": dump_json(self._config)}


def _paired(
    known: Mapping[str, TensorInfo], scheme: Fp8Scheme, where: str
) -> Iterator[tuple[str, Scales]]:
    """Every weight of 8-bit floats with its scales, by name.

    Raises:
        SourceError: see `Fp8Checkpoint`.
    """
    weights = [info for info in known.values() if info.dtype == _CODES]
    if not weights:
        raise SourceError(
            f"{where}: quantization_config says that the checkpoint is already quantized"
            f" (quant_method 'fp8' or 'compressed-tensors'), but no tensor is {_CODES}; remove it"
            " from config.json if the weights are dense"
        )
    for info in weights:
        if not info.name.endswith(_WEIGHT) or len(info.shape) != 2 or 0 in info.shape:
            raise SourceError(
                f"{where}: tensor {info.name!r} is {_CODES} of shape {list(info.shape)}; only"
                " matrices called weight are read in 8-bit floats (no fused experts), convert the"
                " bf16 checkpoint of this model instead"
            )
        yield info.name, _scales_of(info, known, scheme, where)


def _scales_of(
    info: TensorInfo, known: Mapping[str, TensorInfo], scheme: Fp8Scheme, where: str
) -> Scales:
    stem = info.name.removesuffix("weight")
    found = [known[stem + leaf] for leaf in scheme.leaves if stem + leaf in known]
    if len(found) != 1:
        count = "both" if found else "none"
        raise SourceError(
            f"{where}: {info.name} is {_CODES} and needs one tensor of scales,"
            f" {' or '.join(stem + leaf for leaf in scheme.leaves)}, found {count}; the checkpoint"
            " is incomplete, download it again"
        )
    scales, grid = found[0], scheme.grid(info.shape)
    if scales.dtype not in _SCALES:
        raise SourceError(
            f"{where}: {scales.name}: dtype {scales.dtype}, expected {' or '.join(_SCALES)};"
            " convert the bf16 checkpoint of this model instead"
        )
    if not scheme.fits(scales, info.shape):
        raise SourceError(
            f"{where}: {scales.name}: shape {list(scales.shape)}, expected {list(grid)}: one scale"
            f" for {' x '.join(map(str, scheme.block(info.shape)))} values of {info.name}"
            f" {list(info.shape)}; if that is as it was published, convert the bf16 checkpoint of"
            " this model instead, else download it again"
        )
    return Scales(scales.name, scales.dtype, scheme.block(info.shape), info.shape[1])


def _refuse_left(left: list[str], scaled: Mapping[str, Scales], where: str) -> None:
    """Refuse what belongs to quantized weights and has not been understood."""
    for name in left:
        stem, _, leaf = name.rpartition(".")
        if leaf.startswith("weight_") and f"{stem}{_WEIGHT}" in scaled:
            raise SourceError(
                f"{where}: {name} goes with {stem}{_WEIGHT}, which has scales already; such"
                " checkpoints are not known, convert the bf16 checkpoint of this model instead"
            )
        if leaf.startswith("weight_scale"):
            raise SourceError(
                f"{where}: {name} holds scales, but {stem}{_WEIGHT} is not {_CODES}; the checkpoint"
                " is damaged, download it again"
            )
    refuse_quantized_names(left, where)
