"""The two forms of a low-rank adapter on disk: a folder for peft, and a GGUF file for llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor

from sketchconv.errors import OutputError, ProjectionError
from sketchconv.export.architectures import find_architecture
from sketchconv.export.encoders import ENCODERS
from sketchconv.export.rows import rotary_order
from sketchconv.formats import gguf_values as v
from sketchconv.formats.dense_folder import DenseFolderWriter, safetensors_layout
from sketchconv.formats.gguf_layout import GgufInfo, gguf_layout
from sketchconv.formats.gguf_types import GGML_TYPES
from sketchconv.formats.gguf_writer import GgufWriter
from sketchconv.formats.laid_file import FileLayout
from sketchconv.formats.part import Data
from sketchconv.formats.tensors import TensorInfo
from sketchconv.projection.adapter_plan import AdapterPlan, AdapterWeight, peft_config
from sketchconv.projection.low_rank import LowRank
from sketchconv.sources.config import dump_json

TYPES: Final = ("F32", "F16", "BF16")
PEFT_WEIGHTS: Final = "adapter_model.safetensors"
PEFT_CONFIG: Final = "adapter_config.json"


class Writer(Protocol):
    """What both writers of files do."""

    def append(self, name: str, data: Data) -> None:
        """Write the next bytes of a tensor."""

    def commit(self) -> None:
        """Put the output in place."""

    def abort(self) -> None:
        """Leave nothing behind."""


class AdapterForm(Protocol):
    """One form of an adapter."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of each file by name."""

    def open(self) -> Writer:
        """Begin to write, to a temporary beside the output."""

    def tensors(self, weight: AdapterWeight, found: LowRank) -> Iterator[tuple[str, bytes]]:
        """Names and bytes of a weight's two factors."""


class PeftFolder:
    """`adapter_config.json` and `adapter_model.safetensors`: what `PeftModel` loads.

    Args:
        output: the folder to make; nothing that is there is replaced.
        plan: of the adapter.
        rank: of every factor.
        kind: F32, F16 or BF16.

    Raises:
        OutputError: the output exists.
    """

    def __init__(self, output: Path, plan: AdapterPlan, rank: int, kind: str) -> None:
        self._output, self._kind = output, kind
        if output.exists() and not (output.is_dir() and not any(output.iterdir())):
            raise OutputError(f"{output}: exists already; an adapter replaces nothing, remove it")
        infos = [
            TensorInfo(f"{_key(weight)}.{name}.weight", kind, shape)
            for weight in plan.weights
            for name, shape in (("lora_A", (rank, weight.shape[1])),
                                ("lora_B", (weight.shape[0], rank)))
        ]  # fmt: skip
        self._files = {PEFT_CONFIG: dump_json(peft_config(plan, rank))}
        self._layouts: dict[str, FileLayout] = {PEFT_WEIGHTS: safetensors_layout(infos)}
        small = {name: len(data) for name, data in self._files.items()}
        self.sizes = {PEFT_WEIGHTS: self._layouts[PEFT_WEIGHTS].size, **small}

    def open(self) -> Writer:
        """The folder's writer."""
        return DenseFolderWriter(self._output, self._layouts, self._files)

    def tensors(self, weight: AdapterWeight, found: LowRank) -> Iterator[tuple[str, bytes]]:
        """`lora_A` is ``[r, in]``, `lora_B` is ``[out, r]``, also of transposed modules."""
        yield f"{_key(weight)}.lora_A.weight", _encoded(found.right, self._kind)
        yield f"{_key(weight)}.lora_B.weight", _encoded(found.left, self._kind)


class GgufAdapter:
    """One GGUF file of `general.type` adapter: what llama.cpp takes with `--lora`.

    Tensors ``NAME.lora_a`` are ``[r, in]``, ``NAME.lora_b`` ``[out, r]``. Rows of `lora_b` are in
    the order of the weight's own rows in GGUF, which for q and k of the llama family is that of
    rotary pairs. llama.cpp scales by alpha over r, and alpha is r.

    Args:
        output: the file.
        plan: of the adapter.
        rank: of every factor.
        kind: F32, F16 or BF16.
        force: replace a file that is there.

    Raises:
        ArchitectureError: GGUF has no such architecture, or no place for a weight.
        ProjectionError: rows that do not fit the heads.
    """

    def __init__(
        self, output: Path, plan: AdapterPlan, rank: int, kind: str, *, force: bool = False
    ) -> None:
        self._output, self._kind, self._force = output, kind, force
        found = find_architecture(plan.classes, plan.base_id or "the base")
        self._names = {w.name: found.gguf_name(f"{w.module}.weight") for w in plan.weights}
        self._orders = {w.name: _row_order(w, found.change(self._names[w.name]), plan.heads)
                        for w in plan.weights}  # fmt: skip
        infos = [
            GgufInfo(f"{self._names[weight.name]}.{part}", shape, GGML_TYPES[kind])
            for weight in plan.weights
            for part, shape in (("lora_a", (rank, weight.shape[1])),
                                ("lora_b", (weight.shape[0], rank)))
        ]  # fmt: skip
        layout = gguf_layout(_values(found.name, plan, rank, output), infos)
        self._layouts = {output.name: layout}
        self.sizes = {output.name: layout.size}

    def open(self) -> Writer:
        """The file's writer."""
        return GgufWriter(self._output.absolute().parent, self._layouts, self._force)

    def tensors(self, weight: AdapterWeight, found: LowRank) -> Iterator[tuple[str, bytes]]:
        """Both factors, the rows of `lora_b` in GGUF's order."""
        name, order = self._names[weight.name], self._orders[weight.name]
        left = found.left if order is None else found.left[order]
        yield f"{name}.lora_a", _encoded(found.right, self._kind)
        yield f"{name}.lora_b", _encoded(left, self._kind)


def _values(architecture: str, plan: AdapterPlan, rank: int, output: Path) -> dict[str, bytes]:
    from sketchconv import __version__

    values = {
        "general.architecture": v.string(architecture),
        "general.type": v.string("adapter"),
        "adapter.type": v.string("lora"),
        "adapter.lora.alpha": v.float32(float(rank)),
        "general.name": v.string(output.stem),
        "general.quantized_by": v.string(f"sketchconv {__version__}"),
    }
    if plan.base_id:
        values["general.base_model.count"] = v.uint32(1)
        values["general.base_model.0.name"] = v.string(plan.base_id.rpartition("/")[2])
    return values


def _row_order(weight: AdapterWeight, change: str, heads: tuple[int, int, int]) -> Tensor | None:
    """Which of our rows each row of GGUF is; None where they are in one order."""
    if change not in ("rotary_q", "rotary_k"):
        return None
    count, size = heads[change == "rotary_k"], heads[2]
    if weight.shape[0] != count * size or size % 2:
        raise ProjectionError(
            f"{weight.name}: {weight.shape[0]} rows, expected {count} heads of {size} rows"
        )
    return torch.from_numpy(rotary_order(np.arange(weight.shape[0]), size))


def _key(weight: AdapterWeight) -> str:
    return f"base_model.model.{weight.module}"


def _encoded(values: Tensor, kind: str) -> bytes:
    rows = np.require(values.numpy(), np.float32, requirements=["C"])
    data: bytes = ENCODERS[kind].encode(rows).tobytes()
    return data
