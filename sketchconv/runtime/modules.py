"""Torch modules whose weight is a sketch: `SketchLinear`, `SketchEmbedding`, and tied forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sketchconv.kernels import dequantize, plain
from sketchconv.kernels.packed import LUT_DTYPES, Packed
from sketchconv.kernels.planes import packed_size
from sketchconv.runtime.functions import SketchGather, SketchMatmul, gather, multiply

ANCHOR = "dtype_anchor"


class SketchModule(nn.Module):
    """A module whose weight `[rows, columns]` is a sketch.

    State: the buffer `sketch_index`, uint8 ``[rows, groups, bytes]`` in the packing `planes-le`,
    and the parameter `sketch_lut` ``[rows, groups, 2**bits]`` in float16, bfloat16 or float32. Both
    stay as they lie on disk; there is no second copy.

    `.to(dtype)`, `.half()`, `.float()` and their like change `dtype`, the dtype of what the module
    gives out where the input does not decide it, but **not** the LUT: it holds the weight's values,
    and a cast would change them for good. To change it, assign a new parameter to `sketch_lut`.

    The dtype is that of `dtype_anchor`, an empty parameter which comes before the LUT, so that code
    which asks for the dtype of a model's first parameter gets an answer that fits. It is not part
    of `state_dict`.

    On the CPU the fast kernels run; other devices use plain torch operations by tiles (not tried on
    a GPU yet).
    """

    sketch_index: Tensor
    sketch_lut: Tensor
    dtype_anchor: nn.Parameter

    def __init__(
        self,
        rows: int,
        columns: int,
        bits: int,
        groups: int = 1,
        *,
        lut_dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if groups < 1 or columns % groups:
            raise ValueError(f"{groups} groups do not divide {columns} columns")
        if lut_dtype not in LUT_DTYPES:
            raise ValueError(f"a LUT is float16, bfloat16 or float32, not {lut_dtype}")
        self.rows, self.columns, self.bits, self.groups = rows, columns, bits, groups
        self._packed: Packed | None = None
        anchor = torch.empty(0, device=device, dtype=dtype)
        self.register_parameter(ANCHOR, nn.Parameter(anchor, requires_grad=False))
        self._make_state(lut_dtype, device)

    def _make_state(self, lut_dtype: torch.dtype, device: torch.device | str | None) -> None:
        size = packed_size(self.columns // self.groups, self.bits)
        shape = (self.rows, self.groups)
        index = torch.zeros((*shape, size), dtype=torch.uint8, device=device)
        lut = torch.zeros((*shape, 2**self.bits), dtype=lut_dtype, device=device)
        self.register_buffer("sketch_index", index)
        self.sketch_lut = nn.Parameter(lut)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the dense weight that the sketch stands for; follows `.to(dtype)`."""
        return self.dtype_anchor.dtype

    @property
    def weight(self) -> Tensor:
        """The dense weight in `dtype`, decoded at each access; for code that looks at weights."""
        return self.dequantize(self.dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight ``[rows, columns]``; float32 holds it exactly."""
        packed = self.packed()
        if packed is not None:
            return dequantize.decode(packed, dtype)
        with torch.no_grad():
            return plain.decode(*self._tensors(), self.columns, dtype)

    def settle(self) -> None:
        """Move the anchor to the device of the sketch; loaders know nothing of it."""
        device = self._tensors()[0].device
        if self.dtype_anchor.device != device:
            empty = torch.empty(0, device=device, dtype=self.dtype)
            self.dtype_anchor = nn.Parameter(empty, requires_grad=False)

    def packed(self) -> Packed | None:
        """The checked form that the CPU kernels take; None on other devices."""
        index, lut = self._tensors()
        known = self._packed
        if (
            known is not None
            and known.index.data_ptr() == index.data_ptr()
            and known.lut.data_ptr() == lut.data_ptr()
            and known.lut.dtype is lut.dtype
        ):
            return known
        self._packed = None
        if index.is_cpu and lut.is_cpu:
            self._packed = Packed.of(index.contiguous(), lut.contiguous(), self.columns)
        return self._packed

    def _tensors(self) -> tuple[Tensor, Tensor]:
        index, lut = self._buffers["sketch_index"], self._parameters["sketch_lut"]
        if index is None or lut is None:
            raise RuntimeError("the sketch's tensors were removed from the module")
        return index, lut

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SketchModule:
        """Move or cast the module: the LUT is moved, never cast."""
        lut = self._parameters.get("sketch_lut")
        before = None if lut is None else lut.data
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self._parameters.get("sketch_lut")
        if before is not None and after is not None and after.dtype is not before.dtype:
            after.data = before.to(after.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + ANCHOR, None)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, *rest: Any
    ) -> None:
        lost: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, lost, *rest)
        missing.extend(name for name in lost if name != prefix + ANCHOR)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}

    def extra_repr(self) -> str:
        """Shape, bits, groups and the LUT's dtype."""
        lut = str(self._tensors()[1].dtype).removeprefix("torch.")
        return f"{self._shape()}, bits={self.bits}, groups={self.groups}, lut={lut}"

    def _shape(self) -> str:
        return f"rows={self.rows}, columns={self.columns}"


class SketchLinear(SketchModule):
    """`y = x @ W.T + bias` with a sketched `W` ``[out_features, in_features]``.

    Takes float32, bfloat16 or float16 (elsewhere than on the fast path: any float) ``[...,
    in_features]`` and gives ``[..., out_features]`` in the same dtype. Gradients flow to the
    input, the LUT and the bias.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        groups: int = 1,
        *,
        bias: bool = True,
        lut_dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            out_features, in_features, bits, groups, lut_dtype=lut_dtype, device=device, dtype=dtype
        )
        self.in_features, self.out_features = in_features, out_features
        zeros = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``[..., in_features]`` with the transposed weight and add the bias."""
        index, lut = self._tensors()
        if torch.is_grad_enabled() and (x.requires_grad or lut.requires_grad):
            y: Tensor = SketchMatmul.apply(x, index, lut, self.packed())  # type: ignore[no-untyped-call]
        else:
            y = multiply(x, index, lut, self.packed())
        bias = self._parameters["bias"]
        return y if bias is None else y + bias.to(y.dtype)

    def _shape(self) -> str:
        bias = self._parameters["bias"] is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}"


class SketchEmbedding(SketchModule):
    """Look-up of the rows of a sketched ``[num_embeddings, embedding_dim]`` matrix, in `dtype`.

    Rows are multiplied by `scale` where it is not None; `round_scale` rounds it to `dtype` before.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int,
        groups: int = 1,
        *,
        padding_idx: int | None = None,
        lut_dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            bits,
            groups,
            lut_dtype=lut_dtype,
            device=device,
            dtype=dtype,
        )
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx
        self.scale: float | None = None
        self.round_scale = False

    def forward(self, ids: Tensor) -> Tensor:
        """Rows `ids` (integers of any shape) as ``[*ids.shape, embedding_dim]``."""
        index, lut = self._tensors()
        args = (self.columns, self.dtype)
        rows: Tensor
        if torch.is_grad_enabled() and lut.requires_grad:
            rows = SketchGather.apply(lut, ids, index, *args, self.padding_idx, self.packed())  # type: ignore[no-untyped-call]
        else:
            rows = gather(ids, index, lut, *args, self.packed())
        if self.scale is None:
            return rows
        return rows * (rows.new_tensor(self.scale) if self.round_scale else self.scale)

    def _shape(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx}"
