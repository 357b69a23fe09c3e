"""Moments of every channel by itself: means and variances, a few vectors at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sketchconv.formats.tensors import TensorInfo
from sketchconv.sensitivities.activations import Vector, activated
from sketchconv.sensitivities.layout import Layout, Place
from sketchconv.sensitivities.propagation import (
    ATTENTION_SHARE,
    Propagation,
    Rows,
    known,
    scaled_to_one,
)


@dataclass(frozen=True, slots=True)
class Columns:
    """Mean and variance of each channel, float64 ``[n]``."""

    mean: Vector
    variance: Vector

    @property
    def square(self) -> Vector:
        """Mean square of each channel."""
        result: Vector = np.square(self.mean) + self.variance
        return result


class PropagatedMoments(Propagation[Columns]):
    """Second moments of every column of every linear module's input, channels independent.

    Means go through a weight W as W mean, variances as W^2 variance. Sums run in the order of rows
    and columns, so that no result depends on threads or on how rows are cut.
    """

    description = "propagated second moments"

    @property
    def nbytes(self) -> int:
        """A few vectors; and one whole weight, twice, where they are stored transposed."""
        widest = max(math.prod(shape) for shape in self.linear_shapes())
        vectors = 32 * 8 * 4 * max(max(shape) for shape in self.linear_shapes())
        return vectors + (8 * widest if self.layout.family.transposed else 0)

    def __init__(self, layout: Layout, infos: Mapping[str, TensorInfo]) -> None:
        super().__init__(layout, infos)
        self._sums: Columns | None = None
        self._output: Columns | None = None
        self._stored: Rows | None = None
        self._hidden: dict[str, Columns] = {}

    def column_weights(self, name: str) -> Vector | None:
        """Mean square of the input's columns, scaled to mean 1; None outside the layers.

        Raises:
            PlanError: a tensor that they depend on was not shown.
        """
        place = self.reads(name)
        return None if place is None else scaled_to_one(self._input(place).square)

    def factors(self, name: str) -> None:
        """Columns alone."""

    def _input(self, place: Place) -> Columns:
        if place.role == "o":
            return known(self.heads)
        return inner(self._hidden, self.layout) if place.role == "down" else known(self.normed)

    def embed(self, place: Place, begin: int, rows: Rows) -> None:
        """Sums over the rows; of token types the first row alone."""
        from sketchconv.kernels.cpu import accumulate_column_squares, accumulate_column_sums

        if begin == 0:
            self._sums = Columns(np.zeros(rows.shape[1]), np.zeros(rows.shape[1]))
        rows = rows[:1] if place.role == "token_type" else rows
        if place.role == "token_type" and begin:
            return
        sums = known(self._sums)
        accumulate_column_sums(rows, sums.mean, threads=self.threads)
        accumulate_column_squares(rows, sums.variance, threads=self.threads)

    def embedded(self, place: Place) -> Columns:
        """Add the table's mean and variance."""
        sums, count = known(self._sums), self.shapes[place.name][0]
        count = 1 if place.role == "token_type" else count
        mean = sums.mean / count
        variance = np.maximum(sums.variance / count - np.square(mean), 0.0)
        if self.layout.family.scaled_embedding and place.role == "embedding":
            scale = self.layout.hidden
            mean, variance = math.sqrt(scale) * mean, scale * variance
        own = Columns(mean, variance)
        return own if self.stream is None else self.added(self.stream, own)

    def multiply(
        self, shape: tuple[int, ...], begin: int, rows: Rows, place: Place, *, turned: bool
    ) -> None:
        """Rows of the output; a weight that comes as ``[in, out]`` is kept until it is whole."""
        if turned:
            if begin == 0:
                self._stored = np.empty(shape, np.float32)
            whole = known(self._stored)
            whole[begin : begin + len(rows)] = rows
            if begin + len(rows) < shape[0]:
                return
            begin, rows, shape, self._stored = 0, np.ascontiguousarray(whole.T), shape[::-1], None
        if begin == 0:
            self._output = Columns(np.empty(shape[0]), np.empty(shape[0]))
        self._add_rows(known(self._output), self._input(place), begin, rows)

    def _add_rows(self, out: Columns, x: Columns, begin: int, rows: Rows) -> None:
        from sketchconv.kernels.cpu import matvec, squared_matvec

        end = begin + len(rows)
        out.mean[begin:end] = matvec(rows, x.mean, threads=self.threads)
        out.variance[begin:end] = squared_matvec(rows, x.variance, threads=self.threads)

    def attended(self, bias: Vector | None) -> Columns:
        """Each value head once for every query head that shares it."""
        out, (begin, end) = self._with(bias), self.layout.values
        size, share = self.layout.head_dim, self.layout.queries_per_value

        def spread(values: Vector) -> Vector:
            return np.repeat(values[begin:end].reshape(-1, size), share, axis=0).reshape(-1)

        return Columns(spread(out.mean), ATTENTION_SHARE * spread(out.variance))

    def activate(self, place: Place, bias: Vector | None) -> None:
        """Keep what comes before the activation."""
        out = self._with(bias)
        self._hidden |= halves(out) if place.role == "gate_up" else {place.role: out}

    def written(self, place: Place, bias: Vector | None) -> Columns:
        """What o or down gives."""
        if place.role == "down":
            self._hidden = {}
        return self._with(bias)

    def _with(self, bias: Vector | None) -> Columns:
        out = known(self._output)
        return out if bias is None else Columns(out.mean + bias, out.variance)

    def normalised(self, x: Columns, gain: Vector, bias: Vector | None) -> Columns:
        """RMSNorm or LayerNorm: Zhang and Sennrich 2019; Ba et al. 2016, equation 4."""
        mean, variance = x.mean, x.variance
        if self.layout.family.layer_norm:
            count = len(mean)
            mean = mean - mean.mean()
            variance = variance * (1 - 2 / count) + variance.sum() / count**2
        size = float((np.square(mean) + variance).mean()) + self.layout.epsilon
        mean = gain * mean / math.sqrt(size)
        return Columns(mean if bias is None else mean + bias, np.square(gain) * variance / size)

    def added(self, x: Columns, y: Columns) -> Columns:
        """The sum of independent channels."""
        return Columns(x.mean + y.mean, x.variance + y.variance)


def halves(both: Columns) -> dict[str, Columns]:
    """Gate and up of a module that computes both."""
    half = len(both.mean) // 2
    return {
        "gate": Columns(both.mean[:half], both.variance[:half]),
        "up": Columns(both.mean[half:], both.variance[half:]),
    }


def inner(hidden: Mapping[str, Columns], layout: Layout) -> Columns:
    """What comes out of the activation, from what goes into it by role.

    f(s), or f(s) u where there is a gate, with s and u independent and s normal.
    """
    up = hidden["up"]
    gate = hidden.get("gate", up)
    value = activated(layout.activation, gate.mean, gate.variance)
    mean, square = value.mean, value.square
    if gate is not up:
        mean, square = mean * up.mean, square * up.square
    return Columns(mean, np.maximum(square - np.square(mean), 0.0))
