"""Torch modules whose weight is a sketch: `SketchLinear`, `SketchEmbedding`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from sketchconv.adapters.batch import Names, current
from sketchconv.kernels import gemv, plain
from sketchconv.runtime import functions, mixed, modes, ops
from sketchconv.runtime.functions import KERNEL_DTYPES, SketchGather, SketchMatmul
from sketchconv.runtime.sketch import ANCHOR, SketchModule

__all__ = ["ANCHOR", "SketchEmbedding", "SketchLinear", "SketchModule"]


def _same_device(name: str, tensor: Tensor, module: SketchModule) -> None:
    """As torch's own layers: nothing is moved, and nothing runs elsewhere than asked."""
    places = [tensor.device, *(held.device for held in module._tensors())]
    if places.count(tensor.device) != len(places):
        raise RuntimeError(
            "expected all tensors to be on the same device, but "
            f"{name} is on {places[0]}, the index on {places[1]} and the LUT on {places[2]}"
        )


def mixture() -> Names | None:
    """The adapters of the samples of a mixed batch under way; no compiled program is one."""
    return None if is_compiling() else current()


class SketchLinear(SketchModule):
    """`y = x @ W.T + bias` with a sketched `W` ``[out_features, in_features]``.

    Takes ``[..., in_features]`` of any float dtype (fast: float32, bfloat16, float16) and gives
    ``[..., out_features]`` in the same dtype, under autocast in that of autocast. Gradients flow to
    the input, the LUT and the bias, and cannot be differentiated again. Transforms of `torch.func`
    and forward-mode differentiation work, through plain torch operations.
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
        """Multiply ``[..., in_features]`` with the transposed weight and add the bias.

        Raises:
            RuntimeError: `x` and the sketch are on different devices.
            ValueError: `x` has another width, or no float dtype.
        """
        if self.tables().parked and (names := mixture()) is not None:
            return self._mixed(x, names)
        if not modes.ordinary(x) or x.dtype not in KERNEL_DTYPES:
            return self._general(x)
        packed = self.packed()
        if packed is None:
            return self._general(x)
        bias = self._parameters["bias"]
        if torch.is_grad_enabled():
            lut = self._tensors()[1]
            if x.requires_grad or lut.requires_grad:
                y: Tensor = SketchMatmul.apply(x, packed.index, lut, packed, packed.order)  # type: ignore[no-untyped-call]
                return y if bias is None else y + bias.to(y.dtype)
        y = gemv.multiply(packed, x)
        return y if bias is None else y + bias.to(y.dtype)

    def _mixed(self, x: Tensor, names: Names) -> Tensor:
        """As `forward`, for a batch of several adapters."""
        self._check(x)
        y = mixed.linear(self, x, names)
        bias = self._parameters["bias"]
        return y if bias is None else y + bias.to(y.dtype)

    def _check(self, x: Tensor) -> None:
        if not x.is_floating_point() or x.shape[-1] != self.columns:
            raise ValueError(
                f"x must be float [..., {self.columns}], got {x.dtype} {tuple(x.shape)}"
            )
        _same_device("x", x, self)

    def _general(self, x: Tensor) -> Tensor:
        """As `forward`, wherever more is going on than data in CPU memory."""
        self._check(x)
        index, lut = self._tensors()
        x = modes.autocasted(x)
        if modes.traced(x):
            y: Tensor = ops.linear(x, index, lut, self.layout)
        elif modes.transformed():
            y = plain.multiply(x, self.disk_index(), lut)
        else:
            packed, index, lut, layout = self.operands()
            if torch.is_grad_enabled() and (x.requires_grad or lut.requires_grad):
                y = SketchMatmul.apply(x, index, lut, packed, layout)  # type: ignore[no-untyped-call]
            else:
                y = functions.multiply(x, index, lut, packed, layout)
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
        """Rows `ids` (integers of any shape) as ``[*ids.shape, embedding_dim]``.

        Raises:
            RuntimeError: `ids` and the sketch are on different devices.
            IndexError: on the CPU, an id is not that of a row.
        """
        rows = self._rows(ids)
        if self.scale is None:
            return rows
        return rows * (rows.new_tensor(self.scale) if self.round_scale else self.scale)

    def _rows(self, ids: Tensor) -> Tensor:
        _same_device("ids", ids, self)
        if self.tables().parked and (names := mixture()) is not None:
            return mixed.embedding(self, ids, names, self.dtype, self.padding_idx)
        index, lut = self._tensors()
        args = (self.columns, self.dtype)
        if modes.traced(ids):
            found: Tensor = ops.embedding(ids, index, lut, *args, self.padding_idx, self.layout)
            return found
        if modes.transformed():
            found = plain.gather(ids, self.disk_index(), lut, *args)
            if self.padding_idx is None:
                return found
            return torch.where((ids == self.padding_idx)[..., None], found.detach(), found)
        packed, index, lut, layout = self.operands()
        if torch.is_grad_enabled() and lut.requires_grad:
            return SketchGather.apply(lut, ids, index, *args, self.padding_idx, packed, layout)  # type: ignore[no-untyped-call, no-any-return]
        return functions.gather(ids, index, lut, *args, packed, layout)

    def _shape(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx}"
