"""Keys and values of one sequence, as the compiled step reads them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sketchconv.kernels.decoder.ir import LANES
from sketchconv.kernels.decoder.network import padded


class Memory:
    """Keys ``[layers, heads, blocks, dim, 16]`` and values ``[layers, heads, 16 * blocks, width]``.

    16 positions of a key lie side by side, so that scores are sums of whole vectors; `width` is
    `dim`, padded. Pages that no position has reached take no memory.

    Args:
        layers: number of layers.
        heads: key heads of a layer.
        dim: length of a head.
        dtype: float32, bfloat16 or float16.
        capacity: positions to have room for.
    """

    def __init__(
        self, layers: int, heads: int, dim: int, dtype: torch.dtype, capacity: int
    ) -> None:
        self.dim, self.dtype = dim, dtype
        self._shape = (layers, heads)
        self.keys, self.values = self._make(capacity)

    @property
    def blocks(self) -> int:
        """Blocks of 16 positions."""
        return self.keys.shape[2]

    @property
    def capacity(self) -> int:
        """Positions that fit."""
        return self.blocks * LANES

    def _make(self, capacity: int) -> tuple[Tensor, Tensor]:
        blocks = max(-(-capacity // LANES), 1)
        keys = (*self._shape, blocks, self.dim, LANES)
        values = (*self._shape, blocks * LANES, padded(self.dim))
        return self._zeros(keys), self._zeros(values)

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        """Zeros from the system, page by page as they are touched; torch would write them all."""
        size = math.prod(shape) * self.dtype.itemsize
        with torch.inference_mode(False):  # else they could only be written in that mode
            return torch.from_numpy(np.zeros(size, np.uint8)).view(self.dtype).view(shape)

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` positions at least; what is there stays."""
        if capacity <= self.capacity:
            return
        keys, values = self._make(capacity)
        keys[:, :, : self.blocks] = self.keys
        values[:, :, : self.capacity] = self.values
        self.keys, self.values = keys, values

    def put(self, layer: int, first: int, keys: Tensor, values: Tensor) -> None:
        """Store keys and values ``[heads, count, dim]`` at position `first` and the following."""
        positions = torch.arange(first, first + keys.shape[1], device="cpu")
        block, lane = positions // LANES, positions % LANES
        self.keys[layer].transpose(2, 3)[:, block, lane] = keys.to(self.dtype)
        self.values[layer, :, first : first + keys.shape[1], : self.dim] = values.to(self.dtype)

    def get(self, layer: int, count: int) -> tuple[Tensor, Tensor]:
        """Keys (a copy) and values (a view) of `count` positions, each ``[heads, count, dim]``."""
        blocks = -(-count // LANES)
        keys = self.keys[layer, :, :blocks].transpose(2, 3).reshape(self._shape[1], -1, self.dim)
        return keys[:, :count], self.values[layer, :, :count, : self.dim]
