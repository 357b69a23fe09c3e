"""Statistics: what calibration knows of the inputs of one linear layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sketchconv.errors import WeightError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class StatisticsError(WeightError):
    """Statistics that no weight can be fitted to: NaN, or of another shape."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """Second moments of a layer's inputs X (rows: n tokens) inside the compressed model.

    Attributes:
        hessian: float32 ``[in, in]``, ``X'X / n`` over the calibration tokens.
        tokens: n.
        held_out: float32 ``[in, in]``, the same over tokens kept apart; chooses the damping and
            ends the rounds.
        cross: float32 ``[in, in]``, ``(X_dense - X)' X / n``: what the layers before have lost.
        residual: float32 ``[out, in]``, ``(h_dense - h)' X / n``: the error of the residual stream,
            for a weight that writes into it.
    """

    hessian: Tensor
    tokens: int
    held_out: Tensor | None = None
    cross: Tensor | None = None
    residual: Tensor | None = None

    def on(self, device: torch.device) -> Statistics:
        """The same on a device; `residual`, which belongs to one weight, stays where it is."""

        def moved(matrix: Tensor | None) -> Tensor | None:
            return None if matrix is None else matrix.to(device)

        return Statistics(self.hessian.to(device), self.tokens, moved(self.held_out),
                          moved(self.cross), self.residual)  # fmt: skip

    def check(self, rows: int, columns: int) -> None:
        """Refuse statistics that do not belong to a weight ``[rows, columns]``.

        Raises:
            StatisticsError: a matrix has another shape, or holds NaN or infinity.
        """
        square = (columns, columns)
        shapes = {"hessian": square, "held_out": square, "cross": square,
                  "residual": (rows, columns)}  # fmt: skip
        for name, shape in shapes.items():
            matrix: Tensor | None = getattr(self, name)
            if matrix is not None:
                _check(name, matrix, shape)
        if self.tokens < 1:
            raise StatisticsError(f"statistics of {self.tokens} tokens; calibrate on at least one")


def _check(name: str, matrix: Tensor, shape: tuple[int, int]) -> None:
    import torch

    if tuple(matrix.shape) != shape or matrix.dtype is not torch.float32:
        raise StatisticsError(
            f"{name}: expected float32 {list(shape)}, got {matrix.dtype} {list(matrix.shape)}"
        )
    # A sum is NaN or infinite if anything in it is; only then is it worth while to count.
    if not torch.isfinite(matrix.sum(dtype=torch.float64)):
        bad = int((~torch.isfinite(matrix)).sum())
        if bad:
            raise StatisticsError(
                f"{name}: {bad} of {matrix.numel()} values are NaN or infinite; the activations "
                "overflow in the compute dtype, or the checkpoint is damaged"
            )
