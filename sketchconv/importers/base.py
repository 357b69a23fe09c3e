"""What an importer is: it recognises a peer's checkpoint, and finds the weights in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sketchconv.errors import SourceError
from sketchconv.formats.sketches import SketchRecord
from sketchconv.formats.tensors import DTYPES, TensorInfo, U8Array

Carrier = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """What the user says of a peer's checkpoint.

    Args:
        base: folder of the model that was quantized: its config, tokenizer and, for checkpoints
            that hold quantized weights alone, all other weights.
        bits: which precision to take of a checkpoint that has several; None: the highest.
    """

    base: Path | None = None
    bits: int | None = None


class Store(Protocol):
    """The tensors of a checkpoint, as they are in its files.

    Attributes:
        paths: the files.
        nbytes: their size.
    """

    paths: tuple[Path, ...]
    nbytes: int

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor, in a fixed order."""
        ...

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of a tensor, row-major."""
        ...

    def close(self) -> None:
        """Close the files."""
        ...


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A peer's checkpoint before anything is known of its weights.

    Attributes:
        id: what it is called; never an absolute path.
        store: its tensors.
        config: `config.json` as it is, empty if there is none.
        quantization: the settings of the quantization: `quantization_config` of the config, or the
            file that older versions wrote beside it.
    """

    id: str
    store: Store
    config: Mapping[str, Any] = field(default_factory=dict)
    quantization: Mapping[str, Any] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return name in self.store.infos

    def stems(self, suffix: str) -> list[str]:
        """Names of the modules that have a tensor of that suffix, in the store's order."""
        return [name[: -len(suffix)] for name in self.store.infos if name.endswith(suffix)]

    def info(self, name: str, *, dtypes: Sequence[str], rank: int | None = None) -> TensorInfo:
        """The description of a tensor that must be there.

        Raises:
            SourceError: it is missing, or of another dtype or rank.
        """
        info = self.store.infos.get(name)
        if info is None:
            raise SourceError(f"{self.id}: no tensor {name!r}; the checkpoint is incomplete")
        if info.dtype not in dtypes:
            raise SourceError(
                f"{self.id}: {name}: dtype {info.dtype}, expected {' or '.join(dtypes)}"
            )
        if rank is not None and len(info.shape) != rank:
            raise SourceError(f"{self.id}: {name}: shape {list(info.shape)}, expected {rank} axes")
        return info

    def expect(self, name: str, shape: Sequence[int], *, dtypes: Sequence[str]) -> TensorInfo:
        """The description of a tensor whose shape is known.

        Raises:
            SourceError: it is missing, or of another dtype or shape.
        """
        info = self.info(name, dtypes=dtypes)
        if info.shape != tuple(shape):
            raise SourceError(
                f"{self.id}: {name}: shape {list(info.shape)}, expected {list(shape)}"
            )
        return info

    def array(self, name: str) -> Carrier:
        """The whole of a small tensor in its carrier (BF16 as uint16)."""
        return self.rows(name, 0, None)

    def rows(self, name: str, begin: int, end: int | None) -> Carrier:
        """Rows [begin, end) of a tensor along its first axis."""
        info = self.store.infos[name]
        size = info.nbytes // info.shape[0] if info.shape else info.nbytes
        stop = info.shape[0] if info.shape and end is None else (1 if end is None else end)
        raw = self.store.read(name, begin * size, stop * size)
        return np.frombuffer(raw, DTYPES[info.dtype].numpy).reshape(-1, *info.shape[1:])


class Weight(Protocol):
    """One weight of a peer's checkpoint as a sketch."""

    @property
    def record(self) -> SketchRecord:
        """How it is stored as a sketch."""
        ...

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the peer's tensors."""
        ...

    def rows(self, begin: int, end: int) -> tuple[U8Array, Carrier]:
        """Indices uint8 ``[rows, in]`` and tables ``[rows, G, 2**bits]`` in the LUT's carrier.

        Raises:
            SourceError: the file has become shorter, or holds what no index can be.
        """
        ...


class Importer(Protocol):
    """Knows one layout.

    Attributes:
        name: short name, as in a config's `quant_method`.
        layout: whose layout, and of which version.
        formula: the peer's own dequantization, and the dtype of its result.
        complete: whether a checkpoint holds all tensors of its model; otherwise the rest is taken
            from the base.
    """

    name: str
    layout: str
    formula: str
    complete: bool

    def matches(self, checkpoint: Checkpoint) -> bool:
        """Whether the checkpoint claims to be of this layout."""
        ...

    def weights(self, checkpoint: Checkpoint, options: ImportOptions) -> Sequence[Weight]:
        """Every quantized weight.

        Raises:
            SourceError: a tensor is missing or has a wrong shape or dtype, or the weight has no
                exact sketch; the message names the tensor and says what to do.
        """
        ...


def bits_of(entries: int, where: str) -> int:
    """The index width of tables with so many entries.

    Raises:
        SourceError: not a power of two from 2 to 256.
    """
    bits = entries.bit_length() - 1
    if entries != 1 << bits or not 1 <= bits <= 8:
        raise SourceError(f"{where}: tables of {entries} entries; expected 2, 4, 8, ... 256")
    return bits


def record_of(
    stem: str, shape: tuple[int, int], bits: int, groups: int, dtype: str
) -> SketchRecord:
    """The record of a weight whose tables and values have one dtype."""
    return SketchRecord(f"{stem}.weight", shape, dtype, bits, groups, dtype)
