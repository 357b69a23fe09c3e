"""Products of sketched layers in training: each weight decoded once per step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from sketchconv.kernels import dequantize, gradients
from sketchconv.runtime import functions, modes
from sketchconv.runtime.modules import SketchLinear

TILE_WEIGHTS = 1 << 22  # of the dense gradient at a time, but at least LEAST_ROWS rows
LEAST_ROWS = 256


class Product(torch.autograd.Function):
    """`x @ W.T` with a decoded `W`, and gradients of `x` and of the LUT behind `W`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lut: Tensor, layer: DecodedLayer) -> Tensor:
        """Run the product with the decoded weight as it is."""
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, lut)
        ctx.layer = layer
        return functional.linear(x, layer.weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of `x` and of the LUT."""
        x, _ = ctx.saved_tensors
        module, grad_x, grad_table = ctx.layer.module, None, None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ ctx.layer.weight
        if ctx.needs_input_grad[1]:
            grad_table = _grad_lut(module, grad, x)
        return grad_x, grad_table, None


def _grad_lut(module: SketchLinear, grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of the LUT, float32, from ``[..., rows]`` and ``[..., columns]``.

    In bfloat16 on the CPU the dense gradient of a tile is rounded once to bfloat16 before it is
    added up by code: half the products of `gradients.grad_lut`, which keeps 16 bits, and an error
    far below the noise of a step's few tokens.
    """
    packed, index, lut, layout = module.operands()
    if packed is None or grad.dtype is not torch.bfloat16:
        return functions.grad_lut(grad, x, index, lut, layout)
    flat, wide = grad.reshape(-1, module.rows), x.reshape(-1, module.columns)
    step = max(LEAST_ROWS, TILE_WEIGHTS // module.columns)
    parts = []
    for begin in range(0, module.rows, step):
        rows = torch.arange(begin, min(begin + step, module.rows))
        dense = torch.mm(flat[:, begin : begin + step].t(), wide)
        parts.append(gradients.sum_by_code(packed, rows, dense.float()))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class DecodedLayer:
    """A sketched layer and its decoded weight ``[rows, columns]`` in `dtype`."""

    def __init__(self, module: SketchLinear, dtype: torch.dtype) -> None:
        self.module = module
        shape = (module.rows, module.columns)
        self.weight = torch.empty(shape, dtype=dtype, device=module.sketch_lut.device)

    def refresh(self) -> None:
        """Decode the weight from the LUT's present values."""
        packed = self.module.packed()
        if packed is not None and self.weight.dtype in (torch.float32, torch.bfloat16):
            dequantize.decode_into(packed, self.weight)
        else:
            self.weight.copy_(self.module.dequantize(self.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Stands in for the `forward` of the module, under autocast too."""
        x = modes.autocasted(x)
        if x.dtype is not self.weight.dtype:
            return SketchLinear.forward(self.module, x)
        y: Tensor = Product.apply(x, self.module.sketch_lut, self)  # type: ignore[no-untyped-call]
        bias = self.module.bias
        return y if bias is None else y + bias.to(y.dtype)


class Products:
    """The decoded weights of many layers; none where memory is short."""

    def __init__(self, layers: Sequence[DecodedLayer]) -> None:
        self._layers = tuple(layers)

    def refresh(self) -> None:
        """Decode all of them: after the LUTs have changed, before the next product."""
        for layer in self._layers:
            layer.refresh()


@contextmanager
def decoded(modules: Sequence[SketchLinear], dtype: torch.dtype | None) -> Iterator[Products]:
    """Let `modules` multiply with weights that are decoded once per `refresh`.

    Args:
        modules: whose `forward` is replaced for as long as the context lasts, except where somebody
            else has replaced it already.
        dtype: of the decoded weights; None leaves the modules alone, which decode tile by tile.
    """
    free = [] if dtype is None else [m for m in modules if "forward" not in vars(m)]
    layers = [DecodedLayer(module, dtype) for module in free if dtype is not None]
    try:
        for layer in layers:
            layer.module.__dict__["forward"] = layer.forward
        yield Products(layers)
    finally:
        for layer in layers:
            layer.module.__dict__.pop("forward", None)
