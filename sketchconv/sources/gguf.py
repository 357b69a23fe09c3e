"""A GGUF file as a source: Hugging Face names, row order and values."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from sketchconv.errors import SourceError
from sketchconv.formats.container import pread_exact
from sketchconv.formats.tensors import TensorInfo, f32_to_bf16
from sketchconv.sources.base import Float32
from sketchconv.sources.config import dump_json
from sketchconv.sources.gguf_config import build_config
from sketchconv.sources.gguf_header import GgufHeader, GgufTensor, read_header
from sketchconv.sources.gguf_names import (
    ROPE_FACTORS,
    find_architecture,
    hugging_face_name,
    is_rotary,
)
from sketchconv.sources.gguf_tokenizer import tokenizer_files

_PLAIN = {"F32": "F32", "F16": "F16", "BF16": "BF16"}


class GgufSource:
    """One GGUF file of a supported architecture.

    Quantized tensors are dequantized with the `gguf` package, bit-equal to it; as plain copies
    they are stored in BF16. F32, F16 and BF16 tensors are copied as they are. Where the file
    keeps the rows of q and k in the order of rotary pairs, rows are given in Hugging Face's order.

    Raises:
        SourceError: broken, cut off or split into parts.
        ArchitectureError: an architecture, a setting or a tensor that is not supported.
    """

    format = "gguf"
    revision: str | None = None

    def __init__(self, path: Path) -> None:
        self.id = path.name
        self._path = path.resolve()
        self.paths: tuple[Path, ...] = (self._path,)
        self._header = read_header(self._path)
        self.nbytes = self._header.size
        self._arch = find_architecture(self._header.values.get("general.architecture"), self.id)
        self._refuse_parts()
        self._tensors: dict[str, GgufTensor] = {}
        self._kinds: dict[str, tuple[str, int]] = {}
        for tensor in self._header.tensors.values():
            self._add(tensor)
        self._fd: int | None = os.open(self._path, os.O_RDONLY)
        try:
            self._config = build_config(self._header, self._arch, self.id, self._rope_factors())
        except BaseException:
            self.close()
            raise
        self._infos = {name: self._info(name) for name in self._tensors if name != ROPE_FACTORS}

    @property
    def header(self) -> GgufHeader:
        """The file's metadata and its own tensor table."""
        return self._header

    @property
    def stored_names(self) -> Mapping[str, str]:
        """Hugging Face name -> name in the file."""
        return {name: tensor.name for name, tensor in self._tensors.items()}

    def _refuse_parts(self) -> None:
        parts = self._header.values.get("split.count", 0)
        if isinstance(parts, int) and parts > 1:
            raise SourceError(
                f"{self.id}: one of {parts} parts of a split GGUF; join them first with"
                " `llama-gguf-split --merge FIRST_PART WHOLE.gguf`"
            )

    def _add(self, tensor: GgufTensor) -> None:
        rope = tensor.name == ROPE_FACTORS
        name = ROPE_FACTORS if rope else hugging_face_name(self._arch, tensor.name, self.id)
        kind, size = _row_layout(tensor, self.id)
        end = tensor.offset + size * tensor.shape[0]
        if end > self._header.size:
            raise SourceError(
                f"{self.id}: tensor {tensor.name!r} ends at byte {end}, but the file has"
                f" {self._header.size}; the download is cut off, repeat it"
            )
        self._tensors[name] = tensor
        self._kinds[name] = (kind, size)

    def _info(self, name: str) -> TensorInfo:
        return TensorInfo(name, _PLAIN.get(self._kinds[name][0], "BF16"), self._tensors[name].shape)

    def _rope_factors(self) -> list[float] | None:
        if ROPE_FACTORS not in self._tensors:
            return None
        raw = self.rows(ROPE_FACTORS, 0, self._tensors[ROPE_FACTORS].shape[0])
        return [float(value) for value in self.float32(ROPE_FACTORS, raw)]

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor under its Hugging Face name, in the file's order."""
        return MappingProxyType(self._infos)

    def rows(self, name: str, begin: int, end: int) -> bytes:
        """The file's blocks of rows [begin, end) in Hugging Face's order; see `Source.rows`."""
        tensor = self._tensor(name)
        if not 0 <= begin <= end <= tensor.shape[0]:
            raise SourceError(
                f"{name!r}: rows {begin} to {end}, but the tensor has {tensor.shape[0]}"
            )
        if begin == end or not is_rotary(self._arch, tensor.name):
            return self._read(name, begin, end)
        stored = rotary_rows(np.arange(begin, end), self._head_rows(tensor))
        first, last = int(stored.min()), int(stored.max()) + 1
        raw = np.frombuffer(self._read(name, first, last), dtype=np.uint8)
        return raw.reshape(last - first, -1)[stored - first].tobytes()

    def _head_rows(self, tensor: GgufTensor) -> int:
        key = "num_attention_heads" if ".attn_q." in tensor.name else "num_key_value_heads"
        rows = int(self._config["head_dim"])
        if tensor.shape[0] != rows * self._config[key]:
            raise SourceError(
                f"{self.id}: {tensor.name!r} has {tensor.shape[0]} rows; expected"
                f" {self._config[key]} heads of {rows}"
            )
        return rows

    def _read(self, name: str, begin: int, end: int) -> bytes:
        size = self._kinds[name][1]
        if self._fd is None:
            raise SourceError(f"{self.id}: the source is closed")
        offset = self._tensors[name].offset + begin * size
        return pread_exact(self._fd, (end - begin) * size, offset, self.id)

    def float32(self, name: str, raw: bytes) -> Float32:
        """The values of `raw` [rows, ...], dequantized as the `gguf` package does it."""
        from gguf import GGMLQuantizationType, quants

        shape = self._tensor(name).shape[1:]
        kind, size = self._kinds[name]
        if not raw:
            return np.zeros((0, *shape), dtype=np.float32)
        blocks = np.frombuffer(raw, dtype=np.uint8).reshape(-1, size)
        values: Float32 = quants.dequantize(blocks, GGMLQuantizationType[kind])
        return values.astype(np.float32, copy=False).reshape(len(blocks), *shape)

    def stored(self, name: str, raw: bytes) -> bytes:
        """`raw` itself for F32, F16 and BF16; quantized values rounded to BF16."""
        if self._kinds[name][0] in _PLAIN:
            return raw
        return f32_to_bf16(self.float32(name, raw)).tobytes()

    def _tensor(self, name: str) -> GgufTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise SourceError(f"{self.id}: no tensor {name!r}") from None

    def config(self) -> dict[str, Any]:
        """A fresh copy of the config rebuilt from the metadata."""
        return copy.deepcopy(self._config)

    def files(self) -> dict[str, bytes]:
        """The rebuilt config, tokenizer and chat template."""
        files = tokenizer_files(self._path, self._header)
        return {"config.json": dump_json(self._config), **files}

    def close(self) -> None:
        """Close the file."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> GgufSource:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def rotary_rows(rows: npt.NDArray[np.int64], head_rows: int) -> npt.NDArray[np.int64]:
    """Rows of the file that hold the given Hugging Face rows of q or k.

    Inside a head of d rows, row i of half h (h = 0, 1; i < d/2) is stored as row 2 i + h.
    """
    head, inner = np.divmod(rows, head_rows)
    half, index = np.divmod(inner, head_rows // 2)
    stored: npt.NDArray[np.int64] = head * head_rows + 2 * index + half
    return stored


def _row_layout(tensor: GgufTensor, where: str) -> tuple[str, int]:
    """The name of the ggml type and the bytes of one row (one element of a 1-D tensor)."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    try:
        kind = GGMLQuantizationType(tensor.kind)
    except ValueError:
        raise SourceError(f"{where}: {tensor.name!r} has the unknown type {tensor.kind}") from None
    block, size = GGML_QUANT_SIZES[kind]
    try:
        quants.dequantize(np.zeros((1, size), dtype=np.uint8), kind)
    except NotImplementedError:
        raise SourceError(
            f"{where}: {tensor.name!r} has type {kind.name}, which is not supported"
        ) from None
    width = math.prod(tensor.shape[1:])
    if width % block:
        raise SourceError(
            f"{where}: rows of {tensor.name!r} have {width} values, no multiple of {block}"
        )
    return kind.name, width // block * size
