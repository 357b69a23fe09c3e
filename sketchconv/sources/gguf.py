"""A GGUF model as a source: Hugging Face names, orientation, row order and values."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from sketchconv.errors import SourceError
from sketchconv.formats.gguf_layout import GgufInfo
from sketchconv.formats.tensors import TensorInfo, f32_to_bf16
from sketchconv.sources.base import Float32
from sketchconv.sources.config import dump_json
from sketchconv.sources.gguf_blocks import GgufBlocks
from sketchconv.sources.gguf_config import build_config
from sketchconv.sources.gguf_decode import PLAIN, check_decodable
from sketchconv.sources.gguf_header import GgufHeader
from sketchconv.sources.gguf_names import (
    find_architecture,
    hugging_face_name,
    is_rotary,
    is_shifted,
    is_transposed,
)
from sketchconv.sources.gguf_tokenizer import tokenizer_files
from sketchconv.sources.values import row_count, to_float32

_MAX_FACTORS = 1 << 16


class GgufSource:
    """One GGUF model of a supported architecture, in one file or in parts.

    Quantized tensors are dequantized, bit for bit as ggml does it; as plain copies they are stored
    in BF16. F32, F16 and BF16 tensors are copied as they are. Where the file keeps the rows of q
    and k in the order of rotary pairs, rows are given in Hugging Face's order; matrices that
    transformers keeps as ``[in, out]`` are turned; of norms that are stored plus 1, the 1 is taken
    off, which is exact in float32, so that such norms are float32.

    Raises:
        SourceError: broken, cut off, or parts that do not fit together.
        ArchitectureError: an architecture, a setting or a tensor that is not supported.
    """

    format = "gguf"
    revision: str | None = None

    def __init__(self, path: Path) -> None:
        self._blocks = GgufBlocks(path)
        self.id, self.paths = self._blocks.id, self._blocks.paths
        self.nbytes = self._blocks.nbytes
        self._lock = threading.Lock()
        self._turned: tuple[str, bytes] | None = None
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        architecture = self.header.values.get("general.architecture")
        self._arch = find_architecture(architecture, self.id)
        self._tensors: dict[str, GgufInfo] = {}
        for name, tensor in self._blocks.tensors.items():
            if name not in self._arch.factors:
                self._add(tensor)
        self._infos = {name: self._info(name) for name in self._tensors}
        factors = {
            name: self._factors(name) for name in self._arch.factors & {*self.header.tensors}
        }
        self._config = build_config(self.header, self._arch, self.id, factors, self._dtype())

    @property
    def header(self) -> GgufHeader:
        """The model's metadata and its own tensor table."""
        return self._blocks.header

    @property
    def stored_names(self) -> Mapping[str, str]:
        """Hugging Face name -> name in the file."""
        return {name: tensor.name for name, tensor in self._tensors.items()}

    def _add(self, tensor: GgufInfo) -> None:
        name = hugging_face_name(self._arch, tensor.name, self.id)
        if len(tensor.shape) > 2:
            raise SourceError(
                f"{self.id}: {tensor.name!r} has {len(tensor.shape)} axes; expected 1 or 2"
            )
        if name in self._tensors:
            raise SourceError(
                f"{self.id}: {tensor.name!r} and {self._tensors[name].name!r} are one"
            )
        check_decodable(tensor, self.id)
        self._tensors[name] = tensor

    def _info(self, name: str) -> TensorInfo:
        tensor = self._tensors[name]
        shape = tensor.shape[::-1] if is_transposed(self._arch, tensor.name) else tensor.shape
        if is_shifted(self._arch, tensor.name):
            return TensorInfo(name, "F32", shape)
        return TensorInfo(name, tensor.type.name if self._plain(name) else "BF16", shape)

    def _plain(self, name: str) -> bool:
        return self._tensors[name].type.name in PLAIN

    def _factors(self, name: str) -> tuple[float, ...]:
        shape = self._blocks.tensors[name].shape
        if len(shape) != 1 or shape[0] > _MAX_FACTORS:
            raise SourceError(f"{self.id}: {name!r} has the shape {list(shape)}; expected one axis")
        values = self._blocks.float32(name, self._blocks.rows(name, 0, 1))
        return tuple(float(value) for value in values[0])

    def _dtype(self) -> str:
        """Of the model: float32 where most values are, and else bfloat16."""
        counts = [i.count * (1 if i.dtype == "F32" else -1) for i in self._infos.values()]
        return "float32" if sum(counts) > 0 else "bfloat16"

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor under its Hugging Face name, in the file's order."""
        return MappingProxyType(self._infos)

    def rows(self, name: str, begin: int, end: int) -> bytes:
        """Rows [begin, end) in Hugging Face's order and orientation; see `Source.rows`.

        Blocks as the file has them, but for quantized tensors that are turned: those are float32.
        """
        tensor, count = self._tensor(name), row_count(self._infos[name])
        if not 0 <= begin <= end <= count:
            raise SourceError(f"{name!r}: rows {begin} to {end}, but the tensor has {count}")
        if is_transposed(self._arch, tensor.name):
            whole = self._whole_turned(name)
            size = len(whole) // count
            return whole[begin * size : end * size]
        if begin == end or not is_rotary(self._arch, tensor.name):
            return self._stored_rows(tensor, begin, end)
        stored = rotary_rows(np.arange(begin, end), self._head_rows(tensor))
        first, last = int(stored.min()), int(stored.max()) + 1
        raw = np.frombuffer(self._stored_rows(tensor, first, last), dtype=np.uint8)
        return raw.reshape(last - first, -1)[stored - first].tobytes()

    def _stored_rows(self, tensor: GgufInfo, begin: int, end: int) -> bytes:
        """Rows as the file has them; of a vector, values."""
        if len(tensor.shape) == 2:
            return self._blocks.rows(tensor.name, begin, end)
        raw = self._blocks.rows(tensor.name, 0, 1)
        size = len(raw) // tensor.shape[0]
        return raw[begin * size : end * size]

    def _whole_turned(self, name: str) -> bytes:
        """A matrix as ``[in, out]``; the last one is kept, so that its rows need one reading."""
        tensor = self._tensors[name]
        with self._lock:
            if self._turned is None or self._turned[0] != name:
                self._turned = None
                raw = self._blocks.rows(tensor.name, 0, tensor.shape[0])
                kind = {"F32": "<u4", "F16": "<u2", "BF16": "<u2"}.get(tensor.type.name)
                stored: npt.NDArray[Any] = (
                    np.frombuffer(raw, kind).reshape(tensor.shape)
                    if kind is not None
                    else self._blocks.float32(tensor.name, raw)
                )
                self._turned = name, stored.T.tobytes()
            return self._turned[1]

    def _head_rows(self, tensor: GgufInfo) -> int:
        key = "num_attention_heads" if ".attn_q." in tensor.name else "num_key_value_heads"
        rows = int(self._config["head_dim"])
        if tensor.shape[0] != rows * self._config[key] or rows % 2:
            raise SourceError(
                f"{self.id}: {tensor.name!r} has {tensor.shape[0]} rows; expected"
                f" {self._config[key]} heads of {rows}"
            )
        return rows

    def float32(self, name: str, raw: bytes) -> Float32:
        """The values of `raw` [rows, ...], dequantized bit for bit as ggml does it."""
        tensor, shape = self._tensor(name), self._infos[name].shape[1:]
        if is_transposed(self._arch, tensor.name):
            dtype = tensor.type.name if self._plain(name) else "F32"
            return to_float32(raw, TensorInfo(name, dtype, self._infos[name].shape))
        if len(tensor.shape) == 2:
            return self._blocks.float32(tensor.name, raw)
        values = to_float32(raw, TensorInfo(name, tensor.type.name, tensor.shape))
        shifted = is_shifted(self._arch, tensor.name)
        return (values - np.float32(1) if shifted else values).reshape(-1, *shape)

    def stored(self, name: str, raw: bytes) -> bytes:
        """`raw` itself for F32, F16 and BF16; quantized values rounded to BF16."""
        if is_shifted(self._arch, self._tensor(name).name):
            return self.float32(name, raw).tobytes()
        return raw if self._plain(name) else f32_to_bf16(self.float32(name, raw)).tobytes()

    def _tensor(self, name: str) -> GgufInfo:
        try:
            return self._tensors[name]
        except KeyError:
            raise SourceError(f"{self.id}: no tensor {name!r}") from None

    def config(self) -> dict[str, Any]:
        """A fresh copy of the config rebuilt from the metadata."""
        return copy.deepcopy(self._config)

    def files(self) -> dict[str, bytes]:
        """The rebuilt config, tokenizer and chat templates."""
        files = tokenizer_files(self.paths[0], self.header)
        return {"config.json": dump_json(self._config), **files}

    def close(self) -> None:
        """Close all files."""
        self._turned = None
        self._blocks.close()

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
