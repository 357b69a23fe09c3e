"""Propagate the moments of a random token's activations through a network, module by module.

The error that a quantized weight causes depends on what it is multiplied with. Without data that is
estimated from the weights alone: the embeddings give the mean and the spread of the residual
stream, each module turns those of its input into those of its output, and the stream adds them up.
One pass in the order of the network.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from sketchconv.errors import PlanError
from sketchconv.formats.tensors import TensorInfo
from sketchconv.sensitivities.activations import Vector
from sketchconv.sensitivities.families import (
    ADDED_NORMS,
    EMBEDDINGS,
    HIDDEN,
    NORMS,
    READERS,
    STREAM_NORMS,
    VALUES,
    WRITERS,
)
from sketchconv.sensitivities.layout import Layout, Place

# Attention averages the values of many tokens, which removes most of their variance, and none of
# their mean.
ATTENTION_SHARE = 0.3
Rows = npt.NDArray[np.float32]
M = TypeVar("M")


class Propagation(ABC, Generic[M]):
    """The order of a network, carried out on moments of a kind `M` that a subclass computes with.

    Tensors come in the order of the layout; a module takes effect when the next one is asked for or
    shown. Modules act as they do in transformers' own classes of the family, on moments:

    - embeddings: those of a token drawn evenly from all; positions alike, and independent of it;
      of token types the first alone;
    - norms: divided by the root of the mean square over channels (after taking out their mean, for
      LayerNorm), as if that were the same for every token;
    - attention: every head passes on the mean of its values, and a share of their spread;
    - activations: as of normal variables, gate and up independent of each other.
    """

    description: str

    def __init__(self, layout: Layout, infos: Mapping[str, TensorInfo]) -> None:
        self.order = layout.order
        self.layout = layout
        self.threads: int | None = None
        self._places = list(layout.places.values())
        self._index = {name: i for i, name in enumerate(layout.order)}
        self.shapes = {name: infos[name].shape for name in layout.order}
        self._at = 0
        self._complete: set[str] = set()
        self._vectors: dict[bool, Vector] = {}
        self._adds_norms = bool(layout.family.roles & ADDED_NORMS)
        self.stream: M | None = None
        self.normed: M | None = None
        self.heads: M | None = None
        self.delta: M | None = None

    def linear_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the linear weights of the blocks, as they are stored."""
        skipped = NORMS | EMBEDDINGS | {"head"}
        places = [p for p in self._places if not p.bias and p.role not in skipped]
        return [self.shapes[place.name] for place in places]

    def needs(self, name: str) -> bool:
        """Everything but what only reads: the output of q and k changes no moment."""
        place = self.layout.places.get(name)
        return place is not None and place.role not in READERS

    def observe(
        self,
        name: str,
        begin: int,
        rows: Rows,
        threads: int | None = None,
        *,
        matrix: bool = False,
    ) -> None:
        """Take in rows [begin, begin + len(rows)) of a tensor, see `Moments.observe`."""
        place, shape = self.layout.places[name], self.shapes[name]
        turned = self.layout.family.transposed and not matrix
        linear = not place.bias and place.role not in NORMS | EMBEDDINGS
        if linear and self.layout.family.transposed and matrix:
            shape = shape[::-1]
        self.threads = threads
        if begin == 0:
            self.enter(place)
        if place.role in EMBEDDINGS:
            self.embed(place, begin, rows)
        elif place.bias or place.role in NORMS:
            whole = self._vectors.setdefault(place.bias, np.zeros(shape[0]))
            whole[begin : begin + len(rows)] = rows
        else:
            self.multiply(shape, begin, rows, place, turned=turned)
        if begin + len(rows) == shape[0]:
            self._complete.add(name)

    def reads(self, name: str) -> Place | None:
        """The place of a linear weight, all before it done; None for other tensors.

        Raises:
            PlanError: a tensor that its input depends on was not shown.
        """
        place = self.layout.places.get(name)
        if place is None or place.bias or place.role in EMBEDDINGS | NORMS:
            return None
        self.enter(place)
        return place

    def enter(self, place: Place) -> None:
        """Let every module before this one take effect.

        Raises:
            PlanError: a tensor of one was not shown.
        """
        goal = self._index[place.name]
        while self._at < goal:
            here = self._places[self._at]
            if (here.layer, here.role) == (place.layer, place.role):
                return
            if self.needs(here.name) and here.name not in self._complete:
                raise PlanError(
                    f"the second moments for {place.name} need {here.name}, which was not read "
                    "before it; keep that tensor, or choose equal weights"
                )
            self._at += 1
            following = self._places[self._at]
            if (here.layer, here.role) != (following.layer, following.role):
                self._finish(here)

    def _finish(self, place: Place) -> None:
        gain, bias = self._vectors.pop(False, None), self._vectors.pop(True, None)
        if place.role in NORMS and gain is not None:
            self._norm(place.role, gain + self.layout.family.gain_offset, bias)
        elif place.role in EMBEDDINGS:
            self.stream = self.embedded(place)
        elif place.role in VALUES:
            self.heads = self.attended(bias)
        elif place.role in HIDDEN:
            self.activate(place, bias)
        elif place.role in WRITERS:
            self.delta = self.written(place, bias)
            if not self._adds_norms:
                self.stream = self.added(known(self.stream), self.delta)

    def _norm(self, role: str, gain: Vector, bias: Vector | None) -> None:
        if role in ADDED_NORMS:
            delta = self.normalised(known(self.delta), gain, bias)
            self.stream = self.added(known(self.stream), delta)
            return
        self.normed = self.normalised(known(self.stream), gain, bias)
        if role in STREAM_NORMS:
            self.stream = self.normed

    @abstractmethod
    def embed(self, place: Place, begin: int, rows: Rows) -> None:
        """Take in rows of a table of embeddings."""

    @abstractmethod
    def embedded(self, place: Place) -> M:
        """The stream with the table that was just taken in added."""

    @abstractmethod
    def multiply(
        self, shape: tuple[int, ...], begin: int, rows: Rows, place: Place, *, turned: bool
    ) -> None:
        """Take in rows of a linear weight of this shape; `turned`: it is ``[in, out]``."""

    @abstractmethod
    def attended(self, bias: Vector | None) -> M:
        """What the heads pass on, from the weight of the values that was just taken in."""

    @abstractmethod
    def activate(self, place: Place, bias: Vector | None) -> None:
        """Take the output of a weight before the activation."""

    @abstractmethod
    def written(self, place: Place, bias: Vector | None) -> M:
        """The output of a weight that writes into the stream."""

    @abstractmethod
    def normalised(self, x: M, gain: Vector, bias: Vector | None) -> M:
        """The output of a norm."""

    @abstractmethod
    def added(self, x: M, y: M) -> M:
        """The sum of independent variables."""


def known(value: M | None) -> M:
    """A value that an earlier module has given."""
    if value is None:
        raise PlanError("second moments: the tensors came in another order than the network's")
    return value


def scaled_to_one(moments: Vector) -> Vector | None:
    """Weights of mean 1; None where that cannot be."""
    mean = float(moments.mean())
    return moments / mean if mean > 0 and np.isfinite(mean) else None
