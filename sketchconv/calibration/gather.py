"""Sums over tokens of what a group of linear modules is given: Hessians and differences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sketchconv.calibration.statistics import Statistics


class Sums:
    """Running sums for one group of linear modules, float32 on the device of the inputs.

    Args:
        columns: width of the inputs X.
        rows: width of the residual stream for modules that write into it, else None.
    """

    def __init__(self, columns: int, rows: int | None, device: torch.device) -> None:
        self.tokens, self.held_tokens = 0, 0
        self._hessian = torch.zeros(columns, columns, device=device)
        self._held = torch.zeros_like(self._hessian)
        self._cross = torch.zeros_like(self._hessian)
        self._residual = None if rows is None else torch.zeros(rows, columns, device=device)
        self._paired, self._means = True, False

    def add(
        self,
        inputs: Tensor,
        dense: Tensor | None,
        residual: tuple[Tensor, Tensor] | None,
        *,
        held_out: bool,
    ) -> None:
        """Take in a batch of tokens.

        Args:
            inputs: ``[tokens, columns]`` inside the compressed model.
            dense: the same inside the dense model, or None where tokens do not correspond.
            residual: the residual stream ``[tokens, rows]``, dense and compressed.
            held_out: count the tokens in the held-out Hessian only.
        """
        own = _columns(inputs)
        if held_out:
            self.held_tokens += len(inputs)
            self._held += _linear(own, own, inputs)
            return
        self.tokens += len(inputs)
        self._hessian += _linear(own, own, inputs)
        if dense is None or dense.shape != inputs.shape:
            self._paired = False
            return
        self._cross += _linear(_columns(dense).sub_(own), own, inputs)
        if residual is not None and self._residual is not None:
            change = _columns(residual[0]).sub_(residual[1].t())
            self._residual += _linear(change, own, inputs)

    def finite(self) -> bool:
        """Whether no NaN and no infinity came in."""
        sums = [self._hessian, self._held, self._cross]
        return all(bool(torch.isfinite(s.sum())) for s in sums)

    def statistics(self, *, residual: bool) -> Statistics:
        """The means over the tokens; only for `tokens` above 0. Nothing can be added afterwards.

        Args:
            residual: whether to include that of the residual stream.
        """
        self._divide()
        return Statistics(
            hessian=self._hessian,
            tokens=self.tokens,
            held_out=self._held if self.held_tokens else None,
            cross=self._cross if self._paired else None,
            residual=self._residual if residual and self._paired else None,
        )

    def _divide(self) -> None:
        """Turn the sums into means, in place: a second copy of each would be the larger part."""
        if self._means:
            return
        self._means = True
        self._held /= max(self.held_tokens, 1)
        for total in (self._hessian, self._cross, self._residual):
            if total is not None:
                total /= self.tokens


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left.T @ right`` in float32, ``[a, b]`` from ``[tokens, a]`` and ``[tokens, b]``.

    Where `right` is bfloat16, both factors may be taken in bfloat16 on CPUs that have
    instructions for it; sums are float32 in any case. Inputs that are bfloat16 lose nothing.
    """
    return _linear(_columns(left), _columns(right), right)


def _columns(rows: Tensor) -> Tensor:
    """Float32 ``[columns, tokens]``, contiguous, from ``[tokens, columns]``: one copy, our own."""
    return torch.empty(rows.shape[::-1], device=rows.device).copy_(rows.t())


def _linear(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """``a @ b.T``; in bfloat16 where that is allowed for `like`."""
    with _bf16_factors(like):
        return torch.nn.functional.linear(a, b)


@contextmanager
def _bf16_factors(tensor: Tensor) -> Iterator[None]:
    """Allow products of bfloat16 values to use bfloat16 instructions; 2.5 times the speed."""
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    if tensor.device.type != "cpu" or tensor.dtype != torch.bfloat16 or settings is None:
        yield
        return
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
