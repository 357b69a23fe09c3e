"""The parts of a llama-like network as the decoding step needs them: weights and sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sketchconv.kernels.atomics import address_of
from sketchconv.kernels.crew import DECODE_ARGS, MULTIPLY_ARGS
from sketchconv.kernels.decoder.ir import LANES
from sketchconv.kernels.dispatch import choose
from sketchconv.kernels.entries import KINDS
from sketchconv.kernels.ggml.packed import PackedShaped
from sketchconv.kernels.packed import LUT_DTYPES, Packed


def padded(count: int) -> int:
    """`count` rounded up to whole vectors."""
    return -(-count // LANES) * LANES


def floats(values: Tensor) -> Tensor:
    """A float32 copy with zeros up to a whole number of vectors."""
    room = torch.zeros(padded(values.numel()), device="cpu")
    room[: values.numel()] = values.detach().reshape(-1)
    return room


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """A weight `[rows, columns]`, sketched or dense (float16, bfloat16, float32), and its bias.

    `bias` is float32, padded; None where there is none.
    """

    weight: Packed | PackedShaped | Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        weight = self.weight
        if isinstance(weight, Tensor) and (
            weight.dim() != 2
            or weight.dtype not in LUT_DTYPES
            or not weight.is_cpu
            or not weight.is_contiguous()
        ):
            raise ValueError(
                "a dense weight must be a contiguous float matrix in CPU memory, got "
                f"{weight.dtype} {tuple(weight.shape)} on {weight.device}"
            )
        if self.bias is not None and self.bias.numel() < self.rows:
            raise ValueError(f"{self.bias.numel()} biases for {self.rows} rows")

    @property
    def rows(self) -> int:
        """Rows of the weight: results of the product."""
        return self.weight.shape[0] if isinstance(self.weight, Tensor) else self.weight.rows

    @property
    def columns(self) -> int:
        """Columns of the weight."""
        return self.weight.shape[1] if isinstance(self.weight, Tensor) else self.weight.columns

    def source(
        self, kernels: str | None, rows_only: bool = False
    ) -> tuple[int, int, int, int, int]:
        """Kernel address, index, tables, groups and columns of a group; see `layout`.

        Args:
            kernels: name of the kernels (`dispatch.choose`).
            rows_only: the kernel that decodes rows instead of the one that multiplies.

        Raises:
            ValueError: there are no such kernels here, or none that decode rows of a shaped sketch.
        """
        weight = self.weight
        if isinstance(weight, Tensor):
            return 0, weight.data_ptr(), KINDS[LUT_DTYPES[weight.dtype]], 1, weight.shape[1]
        if isinstance(weight, PackedShaped):
            return _shaped_source(weight, kernels, rows_only)
        choice = choose(kernels)
        if rows_only:
            kernel: Any = choice.decode(weight.bits, weight.lut_dtype, "F32", weight.order)
        else:
            kernel = choice.multiply(weight.bits, weight.lut_dtype, weight.order)
        address = address_of(kernel, 2 + (DECODE_ARGS if rows_only else MULTIPLY_ARGS))
        tables = weight.lut.data_ptr()
        return address, weight.index.data_ptr(), tables, weight.groups, weight.group_columns


def _shaped_source(
    weight: PackedShaped, kernels: str | None, rows_only: bool
) -> tuple[int, int, int, int, int]:
    if rows_only:
        raise ValueError("an embedding cannot be a shaped sketch: there is no kernel of its rows")
    address = address_of(weight.kernel(kernels), 2 + MULTIPLY_ARGS)
    groups, width = weight.groups, weight.group_columns
    return address, weight.index.data_ptr(), weight.scale.data_ptr(), groups, width


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One layer. Norms are float32, padded (`floats`); those of heads may be None."""

    attention_norm: Tensor
    query: Matrix
    key: Matrix
    value: Matrix
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Matrix
    feed_norm: Tensor
    gate: Matrix
    up: Matrix
    down: Matrix
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """A whole network.

    `rotations(length)` gives the cosines and sines of positions 0 to `length`, each float32
    ``[length, head_dim]``.
    """

    embedding: Matrix
    layers: tuple[Layer, ...]
    norm: Tensor
    head: Matrix
    eps: float
    head_dim: int
    rotations: Callable[[int], tuple[Tensor, Tensor]]

    @property
    def columns(self) -> int:
        """Width of the residual stream."""
        return self.embedding.columns

    @property
    def heads(self) -> int:
        """Query heads of a layer."""
        return self.layers[0].query.rows // self.head_dim

    @property
    def key_heads(self) -> int:
        """Key and value heads of a layer."""
        return self.layers[0].key.rows // self.head_dim

    def check(self) -> None:
        """Check that all shapes fit together.

        Raises:
            ValueError: a matrix has another shape, or the heads do not divide.
        """
        if not self.layers:
            raise ValueError("a network without layers")
        wide, dim = self.columns, self.head_dim
        inner, keys = self.heads * dim, self.key_heads * dim
        if dim < 2 or dim % 2 or not self.key_heads or self.heads % self.key_heads:
            raise ValueError(f"{self.heads} heads of {dim} with {self.key_heads} keys do not fit")
        feed = self.layers[0].gate.rows
        _expect(self.head, None, wide)
        for layer in self.layers:
            _expect(layer.query, inner, wide)
            _expect(layer.key, keys, wide)
            _expect(layer.value, keys, wide)
            _expect(layer.output, wide, inner)
            _expect(layer.gate, feed, wide)
            _expect(layer.up, feed, wide)
            _expect(layer.down, wide, feed)
            for norm in (layer.attention_norm, layer.feed_norm, self.norm):
                if norm.numel() != padded(wide):
                    raise ValueError(f"a norm of {norm.numel()} weights for {wide} columns")
            for head_norm in (layer.query_norm, layer.key_norm):
                if head_norm is not None and head_norm.numel() != padded(dim):
                    raise ValueError(f"a norm of {head_norm.numel()} weights for heads of {dim}")


def _expect(matrix: Matrix, rows: int | None, columns: int) -> None:
    if matrix.columns != columns or rows not in (None, matrix.rows):
        raise ValueError(
            f"a weight is [{matrix.rows}, {matrix.columns}], expected [{rows or 'any'}, {columns}]"
        )
