"""Parameters of a sketched layer of vLLM, and what brings stored tensors into them.

The rows of fused layers, the ranks and the padding of vocabularies are the business of vLLM's own
loaders (`LinearBase.weight_loader` and its like), which split dimension `output_dim` or `input_dim`
of any parameter. Ours stand before them: they check what arrives, and cut groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from sketchconv.errors import LoadError
from sketchconv.formats.sketches import SketchRecord
from sketchconv.runtime.devices import DISK
from sketchconv.vllm.split import cut_index, cut_lut

_QKV: Final = {"q": 0, "k": 1, "v": 2}
LUT_DTYPES: Final = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True, slots=True)
class Arrival:
    """The way of one kind of tensor into a parameter.

    Attributes:
        kind: `sketch_index` or `sketch_lut`.
        records: of the layer's parts, in their order.
        parts: into which each group is cut.
        inner: vLLM's own loader.
    """

    kind: str
    records: Sequence[SketchRecord]
    parts: int
    inner: Callable[..., Any]

    def __call__(self, param: nn.Parameter, loaded: Tensor, *shard: Any, **named: Any) -> None:
        """Check and cut what was read, and give it to vLLM's loader.

        Raises:
            LoadError: another shape or dtype than the document says, or a layer already in use.
        """
        which = named.get("loaded_shard_id", shard[0] if shard else None)
        part = _position(which)
        if param.sketch_order != DISK:  # type: ignore[attr-defined]
            raise LoadError(f"{self.records[0].stem}: a sketch in use cannot take new weights")
        record = self.records[part or 0]
        self._check(record, loaded)
        if self.kind == "sketch_index":
            cut = cut_index(loaded, record.bits, record.group_size, self.parts)
        else:
            cut = cut_lut(loaded, self.parts)
        self.inner(param, cut, *shard, **named)
        param.sketch_loaded.add(part or 0)  # type: ignore[attr-defined]

    def _check(self, record: SketchRecord, loaded: Tensor) -> None:
        is_index = self.kind == "sketch_index"
        info = record.index_info if is_index else record.lut_info
        dtype = torch.uint8 if is_index else LUT_DTYPES[record.lut_dtype]
        if tuple(loaded.shape) != info.shape or loaded.dtype is not dtype:
            raise LoadError(
                f"{info.name}: expected {dtype} {info.shape}, got {loaded.dtype} "
                f"{tuple(loaded.shape)}"
            )


def _position(shard: Any) -> int | None:
    """The number of a part by vLLM's shard id: "q", "k", "v" or a number; None is the whole."""
    if shard is None or isinstance(shard, int):
        return shard
    if shard in _QKV:
        return _QKV[shard]
    raise LoadError(f"a sketch has no parts that vLLM calls {shard!r}")


def sentinel_arrival(_: nn.Parameter, loaded: Tensor, *shard: Any, **named: Any) -> None:
    """Take the sentinel, one zero byte under a dense name, and drop it.

    Raises:
        LoadError: it is something else, a dense weight for instance.
    """
    if loaded.dtype is not torch.uint8 or loaded.numel() != 1:
        raise LoadError(
            f"a sentinel is one byte, got {loaded.dtype} {tuple(loaded.shape)} under the name of "
            "a sketched weight"
        )


def parameter(data: Tensor, loader: Callable[..., Any], **attributes: Any) -> nn.Parameter:
    """A parameter without gradient that bears what vLLM's loaders look for."""
    made = nn.Parameter(data, requires_grad=False)
    for name, value in {**attributes, "weight_loader": loader}.items():
        setattr(made, name, value)
    return made


def fresh(data: Tensor, loader: Callable[..., Any], extra: Mapping[str, Any]) -> nn.Parameter:
    """A parameter of rows by groups, in the order of the disk, of which nothing is loaded yet."""
    return parameter(
        data, loader, output_dim=0, input_dim=1, sketch_order=DISK, sketch_loaded=set(), **extra
    )
