"""How vLLM makes, loads and runs a layer whose weight is a sketch.

Interfaces as in vLLM 0.33.0: `LinearMethodBase` (`layers/linear.py`) and the `embedding` and
`tie_weights` of `QuantizeMethodBase` (`layers/quantization/base_config.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase

from sketchconv.errors import LoadError
from sketchconv.formats.packing import packed_size
from sketchconv.formats.sketches import SketchRecord
from sketchconv.runtime import ops
from sketchconv.runtime.devices import DISK, arranged, best_order
from sketchconv.vllm.loading import LUT_DTYPES, Arrival, fresh, parameter, sentinel_arrival
from sketchconv.vllm.split import parts_for


class SketchMethod(LinearMethodBase):  # type: ignore[misc]
    """One layer's weight as `sketch_index` and `sketch_lut`, for products and for look-ups.

    On an NVIDIA GPU the index is put into the order of its kernels once all is loaded. Products
    and look-ups are operations of `torch.ops.sketchconv`, which vLLM's compiler takes as they are;
    on CPU tensors they run the CPU kernels.

    Args:
        records: of the layer's parts, in their order; alike in bits, groups and LUT dtype.
        sentinel: whether the checkpoint has a sentinel under the dense name of one of them.
    """

    def __init__(self, records: Sequence[SketchRecord], *, sentinel: bool = False) -> None:
        self.records = tuple(records)
        self.sentinel = sentinel
        self.columns = 0
        self.dtype = torch.float32

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give the layer its parameters: index ``[rows, groups, bytes]``, LUT, both of this rank.

        Raises:
            LoadError: the sketch has another width, or its groups cannot be split among the ranks.
        """
        record = self.records[0]
        if record.shape[1] != input_size:
            raise LoadError(
                f"{record.name}: the sketch has {record.shape[1]} columns, the layer {input_size}"
            )
        degree = input_size // input_size_per_partition
        parts = parts_for(record, degree)
        groups = record.groups * parts // degree
        self.columns, self.dtype = input_size_per_partition, params_dtype
        rows = sum(output_partition_sizes)
        size = packed_size(self.columns // groups, record.bits)
        index = torch.zeros(rows, groups, size, dtype=torch.uint8)
        lut = torch.zeros(rows, groups, 1 << record.bits, dtype=LUT_DTYPES[record.lut_dtype])
        inner = extra_weight_attrs.pop("weight_loader")
        for kind, data in (("sketch_index", index), ("sketch_lut", lut)):
            arrival = Arrival(kind, self.records, parts, inner)
            layer.register_parameter(kind, fresh(data, arrival, extra_weight_attrs))
        if self.sentinel:
            byte = torch.zeros(1, dtype=torch.uint8)
            layer.register_parameter("weight", parameter(byte, sentinel_arrival))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that every part has come, and put the index into the order of its device.

        The placeholder of a sentinel goes: code that looks for a dense weight must not find it.

        Raises:
            LoadError: names what the checkpoint did not hold.
        """
        for kind in ("sketch_index", "sketch_lut"):
            param: Any = getattr(layer, kind)
            missing = [
                record.stem
                for number, record in enumerate(self.records)
                if number not in param.sketch_loaded
            ]
            if missing:
                raise LoadError(f"{missing[0]}.{kind} was not loaded: the checkpoint lacks it")
        layer._parameters.pop("weight", None)
        index: Any = layer.sketch_index
        if index.sketch_order == DISK:  # shared by tied layers, so the order is the tensor's
            group = self.columns // index.shape[1]
            order = best_order(index.data, self.records[0].bits, group)
            index.data = arranged(index.data, self.records[0].bits, group, order)
            index.sketch_order = order

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ W.T + bias`: ``[..., columns]`` to ``[..., rows]`` of this rank."""
        index: Any = layer.sketch_index
        y: Tensor = ops.linear(x, index, layer.sketch_lut, index.sketch_order)
        return y if bias is None else y + bias.to(y.dtype)

    def embedding(self, layer: nn.Module, input_: Tensor) -> Tensor:
        """Rows `input_` of the vocabulary of this rank: ``[*input_.shape, columns]``."""
        index: Any = layer.sketch_index
        rows: Tensor = ops.embedding(
            input_, index, layer.sketch_lut, self.columns, self.dtype, None, index.sketch_order
        )
        return rows

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """Let an output head use the tensors of the embedding.

        Raises:
            LoadError: the embedding is not the same sketch.
        """
        other = getattr(embed_tokens, "quant_method", None)
        if not isinstance(other, SketchMethod) or other.records != self.records:
            raise LoadError(f"{self.records[0].name}: the head is tied to another embedding")
        for kind in ("sketch_index", "sketch_lut"):
            setattr(layer, kind, getattr(embed_tokens, kind))
        layer._parameters.pop("weight", None)
        return layer
