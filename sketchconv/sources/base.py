"""What the pipeline needs of a source: names, shapes, and bytes by rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from sketchconv.formats.tensors import TensorInfo

if TYPE_CHECKING:
    from sketchconv.formats.sketches import SketchRecord

Float32 = npt.NDArray[np.float32]
# Dtypes whose values can be compressed.
FLOATS = ("F64", "F32", "F16", "BF16")


class Source(Protocol):
    """A model's weights and side files, read by rows and never as a whole.

    Every name is a Hugging Face checkpoint name. Reads are positional (`pread`) and may come from
    several threads at once.

    Attributes:
        id: hub id, or the base name of the folder or file; never an absolute path.
        revision: the hub's commit, or None for a local source.
        format: "safetensors" or "gguf".
        paths: files and folders that an output must never replace.
        nbytes: size of the weight files on disk.
        infos: for each tensor the shape, and the dtype in which a plain copy of it is stored.
    """

    id: str
    revision: str | None
    format: str
    paths: tuple[Path, ...]
    nbytes: int

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the source by name, in a fixed order."""
        ...

    def rows(self, name: str, begin: int, end: int) -> bytes:
        """The source's own bytes of rows [begin, end) along the first axis; a scalar has one row.

        Raises:
            SourceError: no such tensor or rows, or the file has become shorter.
        """
        ...

    def float32(self, name: str, raw: bytes) -> Float32:
        """The values of `raw` (from `rows`) as float32 [rows, ...], dequantized where needed."""
        ...

    def stored(self, name: str, raw: bytes) -> bytes:
        """`raw` (from `rows`) in the dtype of `infos[name]`, little endian."""
        ...

    def config(self) -> dict[str, Any]:
        """The model's config as a fresh dict, without `auto_map`."""
        ...

    def files(self) -> dict[str, bytes]:
        """Side files by relative POSIX path: config, tokenizer, templates, licence."""
        ...

    def close(self) -> None:
        """Close every file; reads after this raise."""
        ...


@runtime_checkable
class ReadySource(Source, Protocol):
    """A source some of whose weights are sketches already.

    `rows` of such a weight gives bytes that `ready` knows.
    """

    @property
    def records(self) -> Mapping[str, SketchRecord]:
        """How each of these weights is stored, by name."""
        ...

    def ready(self, name: str, raw: bytes) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]:
        """Packed indices uint8 ``[rows, G, bytes]`` and tables in their carrier, of `raw`."""
        ...

    @property
    def origin(self) -> Mapping[str, Any]:
        """Where they come from, as plain JSON."""
        ...
