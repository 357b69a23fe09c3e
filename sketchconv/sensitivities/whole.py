"""Moments of whole inputs: how channels vary together, so that errors can be compensated.

`columns.py` follows every channel by itself; this module follows means and covariances by the same
steps. So each layer's error can be compensated from column to column as in calibrated compression
(`calibration/solve.py`), although no token was ever run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from sketchconv.calibration.factors import Factors
from sketchconv.calibration.spans import one_thread
from sketchconv.calibration.statistics import Statistics
from sketchconv.sensitivities.activations import Vector, activated
from sketchconv.sensitivities.columns import Columns, halves, inner
from sketchconv.sensitivities.layout import Layout, Place
from sketchconv.sensitivities.propagation import (
    ATTENTION_SHARE,
    Propagation,
    Rows,
    known,
    scaled_to_one,
)
from sketchconv.sensitivities.tiles import product
from sketchconv.sensitivities.vectors import BLOCK, PIECE, Whole, normalised, through

if TYPE_CHECKING:
    from torch import Tensor

    from sketchconv.formats.tensors import TensorInfo

_SQUARES = 20
_WEIGHTS = 6


class PropagatedCovariances(Propagation[Whole]):
    """Second moments E[x x'] of the inputs of every linear module.

    With x of mean m and covariance C in front of a weight W, its output has W m and W C W'. Heads
    are independent of each other but for their means. Behind an activation, channels vary
    together as its mean slope lets them (Price's theorem, to first order), and by themselves as it
    makes them: the input of `down` has its columns weighed, and nothing is compensated there.
    """

    description = "propagated covariances"

    @property
    def nbytes(self) -> int:
        """Squares over a layer's inputs, and the weights of one MLP in float32.

        The stream, what comes out of its norm, the heads and E[x x'] are squares of 4 bytes each;
        factoring takes that in its order, damped, backwards, its factor, the identity and the
        inverse in float64 and the inverse in float32, and a target's work as much again. Of the
        MLP: gate and up until down is there, that scaled, and the transpose of a slope.
        """
        width = max(min(shape) for shape in self.linear_shapes())
        largest = max(math.prod(shape) for shape in self.linear_shapes())
        return 4 * (_SQUARES * width**2 + _WEIGHTS * largest + (2 * BLOCK + 8 * PIECE) * width)

    def __init__(self, layout: Layout, infos: Mapping[str, TensorInfo]) -> None:
        super().__init__(layout, infos)
        self._sum: Whole | None = None
        self._block: Tensor | None = None
        self._weight: Tensor | None = None
        self._hidden: dict[str, Columns] = {}
        self._slopes: dict[str, Tensor] = {}
        self._factors: tuple[object, Factors] | None = None

    def observe(
        self,
        name: str,
        begin: int,
        rows: Rows,
        threads: int | None = None,
        *,
        matrix: bool = False,
    ) -> None:
        """Take in rows of a tensor, see `Moments.observe`; only products use several threads."""
        with one_thread(torch.empty(0)):
            super().observe(name, begin, rows, threads, matrix=matrix)

    def enter(self, place: Place) -> None:
        """Let every module before this one take effect."""
        with one_thread(torch.empty(0)):
            super().enter(place)

    def column_weights(self, name: str) -> Vector | None:
        """Mean square of the input's columns, scaled to mean 1; None outside the layers.

        Raises:
            PlanError: a tensor that they depend on was not shown.
        """
        place = self.reads(name)
        if place is None:
            return None
        if place.role == "down":
            return scaled_to_one(inner(self._hidden, self.layout).square)
        return scaled_to_one(self._input(place).square)

    def factors(self, name: str) -> Factors | None:
        """Second moments of the inputs of a linear module, to compensate with; None for others.

        Raises:
            PlanError: a tensor that they depend on was not shown.
        """
        place = self.reads(name)
        if place is None or place.role in ("down", "head"):
            return None
        x = self._input(place)
        if self._factors is None or self._factors[0] is not x:
            self._factors = (x, Factors(Statistics(x.moments, 1)))
        return self._factors[1]

    def _input(self, place: Place) -> Whole:
        return known(self.heads if place.role == "o" else self.normed)

    def embed(self, place: Place, begin: int, rows: Rows) -> None:
        """Sums in blocks that do not depend on how rows arrive; of token types the first row."""
        total, width = self.shapes[place.name]
        if begin == 0:
            self._sum = Whole(torch.zeros(width), torch.zeros(width, width))
            self._block = torch.empty(min(BLOCK, total), width)
        block, sums, values = known(self._block), known(self._sum), torch.from_numpy(rows)
        while len(values):
            at = begin % BLOCK
            part = values[: min(BLOCK - at, len(values))]
            block[at : at + len(part)] = part
            begin, values = begin + len(part), values[len(part) :]
            if place.role == "token_type":
                self._sum = Whole(block[0].clone(), sums.covariance)
                return
            if begin % BLOCK == 0 or begin == total:
                whole = block[: at + len(part)].T.contiguous()
                sums.mean.add_(whole.double().sum(1).float())
                sums.covariance.add_(product(whole, whole, self.threads))

    def embedded(self, place: Place) -> Whole:
        """Add the table's mean and covariance."""
        own, self._sum, self._block = known(self._sum), None, None
        if place.role != "token_type":
            count = self.shapes[place.name][0]
            mean = own.mean / count
            own = Whole(mean, own.covariance / count - torch.outer(mean, mean))
        if self.layout.family.scaled_embedding and place.role == "embedding":
            scale = self.layout.hidden
            own = Whole(math.sqrt(scale) * own.mean, scale * own.covariance)
        return own if self.stream is None else self.added(self.stream, own)

    def multiply(
        self, shape: tuple[int, ...], begin: int, rows: Rows, place: Place, *, turned: bool
    ) -> None:
        """Keep a weight until it is whole."""
        if begin == 0:
            self._weight = torch.empty(shape)
        weight = known(self._weight)
        weight[begin : begin + len(rows)] = torch.from_numpy(rows)
        if turned and begin + len(rows) == shape[0]:
            self._weight = weight.T.contiguous()

    def _taken(self) -> Tensor:
        """The weight that was just taken in, ``[out, in]``."""
        weight, self._weight = known(self._weight), None
        return weight

    def attended(self, bias: Vector | None) -> Whole:
        """Covariances of one head at a time; each value head serves all that share it."""
        weight, x = self._taken()[slice(*self.layout.values)], known(self.normed)
        size, share = self.layout.head_dim, self.layout.queries_per_value
        half, mean = product(weight, x.covariance, self.threads), through(weight, x.mean)
        if bias is not None:
            mean = mean + torch.from_numpy(bias[slice(*self.layout.values)]).float()
        blocks = [
            product(half[at : at + size], weight[at : at + size], self.threads)
            for at in range(0, len(weight), size)
        ]
        spread: Tensor = torch.block_diag(*(b for b in blocks for _ in range(share)))  # type: ignore[no-untyped-call]
        means = mean.view(-1, size).repeat_interleave(share, dim=0).view(-1)
        return Whole(means, ATTENTION_SHARE * spread)

    def activate(self, place: Place, bias: Vector | None) -> None:
        """Keep mean and variance of what comes before the activation, and the weight."""
        weight, x = self._taken(), known(self.normed)
        parts = [
            (product(rows, x.covariance, self.threads).double() * rows).sum(1)
            for rows in torch.split(weight, PIECE)
        ]
        mean = through(weight, x.mean).double().numpy()
        out = Columns(mean if bias is None else mean + bias, torch.cat(parts).clamp(min=0).numpy())
        if place.role == "gate_up":
            self._hidden = halves(out)
            self._slopes = dict(zip(("gate", "up"), weight.chunk(2), strict=True))
        else:
            self._hidden[place.role], self._slopes[place.role] = out, weight

    def written(self, place: Place, bias: Vector | None) -> Whole:
        """What o or down gives."""
        weight = self._taken()
        if place.role == "o":
            heads = known(self.heads)
            mean = through(weight, heads.mean)
            half = product(weight, heads.covariance, self.threads)
            covariance = product(half, weight, self.threads)
        else:
            mean, covariance = self._down(weight)
        return Whole(mean if bias is None else mean + torch.from_numpy(bias).float(), covariance)

    def _down(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """W (diag(d) + J C J') W', J the mean slope of the activations, d what is left of them."""
        value, x = inner(self._hidden, self.layout), known(self.normed)
        slope = self._slope()
        parts = [
            (product(rows, x.covariance, self.threads).double() * rows).sum(1)
            for rows in torch.split(slope, PIECE)
        ]
        own = np.maximum(value.variance - torch.cat(parts).numpy(), 0.0)
        writes = product(weight, slope.T.contiguous(), self.threads)
        mean = through(weight, torch.from_numpy(value.mean).float())
        covariance = product(weight * torch.from_numpy(own).float(), weight, self.threads)
        half = product(writes, x.covariance, self.threads)
        self._hidden, self._slopes = {}, {}
        return mean, covariance + product(half, writes, self.threads)

    def _slope(self) -> Tensor:
        """d(activation)/d(input) in the mean, ``[inner, hidden]``; weights are not kept."""
        up = self._hidden["up"]
        gate = self._hidden.get("gate", up)
        value = activated(self.layout.activation, gate.mean, gate.variance)

        def rows(factor: Vector) -> Tensor:
            return torch.from_numpy(factor).float().unsqueeze(1)

        if gate is up:
            return self._slopes["up"].mul_(rows(value.slope))
        slope = self._slopes["up"].mul_(rows(value.mean))
        return slope.addcmul_(self._slopes["gate"], rows(value.slope * up.mean))

    def normalised(self, x: Whole, gain: Vector, bias: Vector | None) -> Whole:
        """RMSNorm or LayerNorm."""
        family = self.layout.family
        return normalised(x, gain, bias, self.layout.epsilon, centred=family.layer_norm)

    def added(self, x: Whole, y: Whole) -> Whole:
        """The sum of independent vectors."""
        return Whole(x.mean + y.mean, x.covariance + y.covariance)
