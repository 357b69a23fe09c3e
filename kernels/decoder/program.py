"""A network written down as phases (`layout`), with the addresses of all that they touch."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sketchconv.kernels.decoder import layout as at
from sketchconv.kernels.decoder.memory import Memory
from sketchconv.kernels.decoder.network import Layer, Matrix, Network, padded
from sketchconv.kernels.entries import KINDS
from sketchconv.kernels.packed import LUT_DTYPES

# Small chunks start more kernels than an even split gains; a large one keeps the others waiting
# where its thread loses its core.
SMALLEST_CHUNK, LARGEST_CHUNK = 1 << 15, 1 << 20  # weights
CHUNKS_PER_THREAD = 2


class Program:
    """The phases of `network` for `threads` threads, on buffers of its own and on `memory`.

    `phases` and `reals` are what `loop.run` takes; `logits`, float32 ``[vocabulary]``, is where the
    logits of a token come to lie.
    """

    def __init__(
        self, network: Network, memory: Memory, threads: int, kernels: str | None = None
    ) -> None:
        network.check()
        self._network, self._memory, self._threads = network, memory, threads
        self._kernels = kernels
        count = 2 + 5 * len(network.layers)
        self.phases: NDArray[np.int64] = np.zeros((count, at.FIELDS), np.int64)
        self.reals: NDArray[np.float32] = np.zeros((count, at.REALS), np.float32)
        self._kept: list[Tensor] = []
        heads = network.heads * network.head_dim
        keys = network.key_heads * network.head_dim
        feed = network.layers[0].gate.rows
        self._x, self._q, self._mixed = map(self._buffer, (network.columns, heads, heads))
        self._k, self._v = self._buffer(keys), self._buffer(keys)
        self._gate, self._up, self._fed = (self._buffer(feed) for _ in range(3))
        self._sum, self._logits = map(self._buffer, (network.columns, network.head.rows))
        self.logits = self._logits[: network.head.rows]
        self._write()
        self.attach()

    @property
    def own_floats(self) -> int:
        """Size of the memory that each thread needs for itself, in float32."""
        network = self._network
        vectors = at.OWN_VECTORS * padded(network.head_dim)
        return max(padded(network.columns), vectors + self._memory.capacity)

    def attach(self) -> None:
        """Take over the addresses of `memory`, which changed if it grew."""
        memory, layers = self._memory, range(len(self._network.layers))
        self._cos, self._sin = self._network.rotations(memory.capacity)
        expected = (memory.capacity, self._network.head_dim)
        for table in (self._cos, self._sin):
            if table.shape != expected or table.dtype is not torch.float32:
                raise ValueError(f"rotations are {tuple(table.shape)}, expected {expected}")
        for layer in layers:
            row = self.phases[2 + 5 * layer]
            row[at.KEYS] = memory.keys[layer].data_ptr()
            row[at.VALUES] = memory.values[layer].data_ptr()
            row[at.BLOCKS] = memory.blocks
            row[at.COS], row[at.SIN] = self._cos.data_ptr(), self._sin.data_ptr()

    def _buffer(self, count: int) -> Tensor:
        made = torch.zeros(padded(count), device="cpu")
        self._kept.append(made)
        return made

    def _write(self) -> None:
        network = self._network
        row = self.phases[0]
        row[at.KIND], row[at.CHUNKS] = at.EMBED, 1
        source = network.embedding.source(self._kernels, rows_only=True)
        row[at.E_KERNEL : at.E_TARGET] = source
        row[at.E_TARGET] = self._x.data_ptr()
        for number, layer in enumerate(network.layers):
            self._layer(1 + 5 * number, layer)
        self._linear(len(self.phases) - 1, self._x, (network.head,), (self._logits,), network.norm)

    def _layer(self, first: int, layer: Layer) -> None:
        x, qkv = self._x, (layer.query, layer.key, layer.value)
        self._linear(first, x, qkv, (self._q, self._k, self._v), layer.attention_norm)
        self._attend(first + 1, layer)
        self._linear(first + 2, self._mixed, (layer.output,), (self._sum,))
        self._finish(first + 2, at.ADD, x)
        feeds = (self._gate, self._up)
        self._linear(first + 3, x, (layer.gate, layer.up), feeds, layer.feed_norm, together=True)
        self._finish(first + 3, at.GATE, self._fed)
        self._linear(first + 4, self._fed, (layer.down,), (self._sum,))
        self._finish(first + 4, at.ADD, x)

    def _finish(self, number: int, how: int, target: Tensor) -> None:
        row = self.phases[number]
        row[at.FINISH], row[at.TARGET] = how, target.data_ptr()

    def _linear(
        self,
        number: int,
        x: Tensor,
        matrices: tuple[Matrix, ...],
        results: tuple[Tensor, ...],
        norm: Tensor | None = None,
        together: bool = False,
    ) -> None:
        row = self.phases[number]
        rows = matrices[0].rows if together else sum(matrix.rows for matrix in matrices)
        columns = matrices[0].columns
        weights = columns * sum(matrix.rows for matrix in matrices)
        step, chunks = self._cut(rows, weights)
        row[at.KIND], row[at.CHUNKS], row[at.CHUNK_ROWS] = at.LINEAR, chunks, step
        row[at.X], row[at.COLUMNS], row[at.COUNT] = x.data_ptr(), columns, len(matrices)
        row[at.NORM] = 0 if norm is None else norm.data_ptr()
        self.reals[number, at.EPS] = self._network.eps
        for i, (matrix, result) in enumerate(zip(matrices, results, strict=True)):
            kernel, index, tables, groups, width = matrix.source(self._kernels)
            bias = 0 if matrix.bias is None else matrix.bias.data_ptr()
            start = at.FIRST + i * at.MATRIX
            fields = (kernel, index, tables, matrix.rows, groups, width, bias, result.data_ptr())
            row[start : start + at.MATRIX] = fields

    def _cut(self, rows: int, weights: int) -> tuple[int, int]:
        """Rows of a chunk, whole vectors of results, and the number of chunks."""
        wanted = 1
        if self._threads > 1:
            many = max(self._threads * CHUNKS_PER_THREAD, weights // LARGEST_CHUNK)
            wanted = max(min(many, weights // SMALLEST_CHUNK), 1)
        step = padded(-(-rows // wanted))
        return step, -(-rows // step)

    def _attend(self, number: int, layer: Layer) -> None:
        network, row = self._network, self.phases[number]
        row[at.KIND], row[at.CHUNKS] = at.ATTEND, network.heads
        pointers = (self._q, self._k, self._v, self._mixed)
        row[at.Q : at.OUT + 1] = [buffer.data_ptr() for buffer in pointers]
        row[at.HEADS], row[at.SHARE] = network.heads, network.heads // network.key_heads
        row[at.DIM], row[at.WIDTH] = network.head_dim, padded(network.head_dim)
        row[at.CACHE] = KINDS[LUT_DTYPES[self._memory.dtype]]
        for field, norm in ((at.Q_NORM, layer.query_norm), (at.K_NORM, layer.key_norm)):
            row[field] = 0 if norm is None else norm.data_ptr()
        self.reals[number, at.EPS] = network.eps
        self.reals[number, at.SCALE] = layer.scale
