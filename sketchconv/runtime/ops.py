"""Operations `torch.ops.sketchconv.*`: what tracers (`torch.compile`, `torch.export`) see of us.

Eager code calls the kernels directly: a dispatched operation costs 12 us, a direct call 1. The
operations are whole: a traced program holds `sketchconv::linear` and its gradients, not their
insides, and needs `import sketchconv` wherever it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sketchconv.runtime import functions

LIBRARY: Any = torch.library.Library("sketchconv", "DEF")  # type: ignore[no-untyped-call]
SCHEMAS = (
    "linear(Tensor x, Tensor index, Tensor lut, str layout) -> Tensor",
    "linear_grad_input(Tensor grad, Tensor index, Tensor lut, SymInt columns, str layout)"
    " -> Tensor",
    "linear_grad_lut(Tensor grad, Tensor x, Tensor index, Tensor lut, str layout) -> Tensor",
    "embedding(Tensor ids, Tensor index, Tensor lut, SymInt columns, ScalarType dtype,"
    " int? padding, str layout) -> Tensor",
    "embedding_grad_lut(Tensor grad, Tensor ids, Tensor index, Tensor lut, int? padding,"
    " str layout) -> Tensor",
)


def _linear(x: Tensor, index: Tensor, lut: Tensor, layout: str) -> Tensor:
    packed = functions.packed_of(index, lut, x.shape[-1], layout)
    return functions.multiply(x, index, lut, packed, layout)


def _embedding(
    ids: Tensor,
    index: Tensor,
    lut: Tensor,
    columns: int,
    dtype: torch.dtype,
    padding: int | None,
    layout: str,
) -> Tensor:
    packed = functions.packed_of(index, lut, columns, layout)
    return functions.gather(ids, index, lut, columns, dtype, packed, layout)


def _fake_linear(x: Tensor, index: Tensor, lut: Tensor, layout: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], lut.shape[0]))


def _fake_grad_input(grad: Tensor, index: Tensor, lut: Tensor, columns: int, layout: str) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], columns))


def _fake_grad_lut(grad: Tensor, x: Tensor, index: Tensor, lut: Tensor, layout: str) -> Tensor:
    return torch.empty_like(lut)


def _fake_embedding(
    ids: Tensor, index: Tensor, lut: Tensor, columns: int, dtype: torch.dtype, *_: Any
) -> Tensor:
    return lut.new_empty((*ids.shape, columns), dtype=dtype)


def _fake_grad_rows(grad: Tensor, ids: Tensor, index: Tensor, lut: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(lut)


def _keep_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index, lut, ctx.layout = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, index, lut)
    ctx.columns = x.shape[-1]


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, index, lut = ctx.saved_tensors
    grad_x = grad_table = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.sketchconv.linear_grad_input(grad, index, lut, ctx.columns, ctx.layout)
    if ctx.needs_input_grad[2]:
        grad_table = torch.ops.sketchconv.linear_grad_lut(grad, x, index, lut, ctx.layout)
    return grad_x, None, grad_table, None


def _keep_embedding(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, index, lut, _, _, ctx.padding, ctx.layout = inputs
    ctx.save_for_backward(ids, index, lut)


def _embedding_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    ids, index, lut = ctx.saved_tensors
    total = torch.ops.sketchconv.embedding_grad_lut(grad, ids, index, lut, ctx.padding, ctx.layout)
    return None, None, total, None, None, None, None


def _no_second_derivative(ctx: Any, *_: Any) -> Any:
    raise RuntimeError("sketched products can be differentiated once, not twice")


def _register() -> None:
    table: tuple[tuple[str, Callable[..., Tensor], Callable[..., Tensor]], ...] = (
        ("linear", _linear, _fake_linear),
        ("linear_grad_input", functions.grad_input, _fake_grad_input),
        ("linear_grad_lut", functions.grad_lut, _fake_grad_lut),
        ("embedding", _embedding, _fake_embedding),
        ("embedding_grad_lut", functions.grad_rows, _fake_grad_rows),
    )
    for schema, (name, run, fake) in zip(SCHEMAS, table, strict=True):
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"sketchconv::{name}", fake, lib=LIBRARY)
    autograd: Any = torch.library.register_autograd
    autograd("sketchconv::linear", _linear_backward, setup_context=_keep_linear, lib=LIBRARY)
    autograd(
        "sketchconv::embedding", _embedding_backward, setup_context=_keep_embedding, lib=LIBRARY
    )
    for name in ("linear_grad_input", "linear_grad_lut", "embedding_grad_lut"):
        autograd(f"sketchconv::{name}", _no_second_derivative, lib=LIBRARY)


_register()
linear: Any = torch.ops.sketchconv.linear.default
embedding: Any = torch.ops.sketchconv.embedding.default
