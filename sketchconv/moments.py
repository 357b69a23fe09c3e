"""Column weights for k-means without any data: second moments propagated through the network.

The error that a quantized weight w causes is proportional to the mean square of the input it is
multiplied with, so that mean square is its weight in k-means. Without data it is estimated from
the weights alone: the embedding gives every channel's mean square, each module turns the mean
squares of its inputs into those of its outputs (as if inputs were independent and had mean 0),
and the residual stream adds them up. One pass in the order of the network; the state is a few
vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from sketchconv.errors import PlanError
from sketchconv.formats.tensors import TensorInfo
from sketchconv.llama_layout import Layout, Place, find_layout
from sketchconv.recipe import Weighting

if TYPE_CHECKING:
    from sketchconv.calibration.factors import Factors

Vector = npt.NDArray[np.float64]
Rows = npt.NDArray[np.float32]

# Attention averages the values of many tokens, which removes most of their variance.
ATTENTION_SHARE = 0.3
_HERMITE_NODES = 32


class Moments(Protocol):
    """Column weights, tensor by tensor, in the order of `order`.

    For each tensor the caller asks for `column_weights`, and then, if `needs` says so, shows every
    run of rows to `observe`.
    """

    @property
    def description(self) -> str:
        """One line for the report: which weights, and why."""
        ...

    @property
    def order(self) -> tuple[str, ...]:
        """Names of the tensors that must come first, in this order."""
        ...

    def needs(self, name: str) -> bool:
        """Whether `observe` must see this tensor."""
        ...

    def column_weights(self, name: str) -> Vector | None:
        """Weights [columns] of mean 1, or None for equal weights.

        Raises:
            PlanError: a tensor that these weights depend on was not shown.
        """
        ...

    def factors(self, name: str) -> Factors | None:
        """Second moments of whole inputs, to compensate errors with; None: only of columns.

        Raises:
            PlanError: as for `column_weights`.
        """
        ...

    def observe(self, name: str, begin: int, rows: Rows, threads: int | None = None) -> None:
        """Take in rows [begin, begin + len(rows)) of a tensor, as float32 [rows, ...].

        No result depends on `threads`; None takes every core.
        """
        ...


@dataclass(frozen=True, slots=True)
class EqualWeights:
    """No preference between columns."""

    description: str
    order: tuple[str, ...] = ()

    def needs(self, name: str) -> bool:
        """Nothing is needed."""
        return False

    def column_weights(self, name: str) -> Vector | None:
        """Equal weights for every tensor."""
        return None

    def factors(self, name: str) -> None:
        """Nothing is known of any input."""

    def observe(self, name: str, begin: int, rows: Rows, threads: int | None = None) -> None:
        """Nothing to take in."""


def equal_weights(reason: str) -> Moments:
    """Equal weights for every column, and why."""
    return EqualWeights(f"equal weights: {reason}")


def make_moments(
    config: Mapping[str, Any], infos: Mapping[str, TensorInfo], weighting: Weighting = "moments"
) -> Moments:
    """What the recipe's weighting asks for, if the architecture is one that it is known for."""
    if weighting == "equal":
        return equal_weights("asked for by the recipe")
    layout = find_layout(config, infos)
    if isinstance(layout, str):
        return equal_weights(layout)
    if weighting == "covariances":
        from sketchconv.covariances import PropagatedCovariances

        return PropagatedCovariances(layout, infos)
    return PropagatedMoments(layout, infos)


class PropagatedMoments:
    """Second moments of every linear module's input in a llama-like network.

    With h the residual stream and v_h its mean square per channel (at first that of the
    embedding's columns), and W^2 the squared entries of W:

    - q, k, v, gate, up, head: gain^2 v_h / (mean(v_h) + eps), as RMSNorm's output;
    - o: W_v^2 x, once for each query head that shares the value head; v_h += 0.3 W_o^2 (that);
    - down: E[silu(s)^2] (W_up^2 x) with s normal of variance W_gate^2 x; v_h += W_down^2 (that).

    Biases add their squares. Sums run in the order of rows and columns, so that no result depends
    on threads or on how rows are cut.
    """

    description = "propagated second moments"

    def __init__(self, layout: Layout, infos: Mapping[str, TensorInfo]) -> None:
        self.order = layout.order
        self._layout = layout
        self._shapes = {name: infos[name].shape for name in layout.order}
        self._residual: Vector = np.zeros(layout.hidden)
        self._outputs: dict[str, Vector] = {}
        self._inputs: dict[str, Vector] = {}
        self._seen: dict[str, int] = {}

    def needs(self, name: str) -> bool:
        """Everything up to the last layer; not q and k, whose outputs change no mean square."""
        place = self._layout.places.get(name)
        return place is not None and place.role not in ("q", "k", "head")

    def column_weights(self, name: str) -> Vector | None:
        """Mean square of the input's columns, scaled to mean 1; None outside the layers."""
        place = self._layout.places.get(name)
        if place is None or place.bias or place.role in ("embedding", "norm_1", "norm_2", "norm"):
            return None
        moments = self._input(place)
        mean = float(moments.mean())
        return moments / mean if mean > 0 and np.isfinite(mean) else None

    def factors(self, name: str) -> None:
        """Columns alone."""

    def observe(self, name: str, begin: int, rows: Rows, threads: int | None = None) -> None:
        """Propagate through these rows."""
        from sketchconv.kernels.cpu import accumulate_column_squares, squared_matvec

        place = self._layout.places[name]
        if begin == 0:
            self._start(place)
        if place.role == "embedding":
            accumulate_column_squares(rows, self._residual, threads=threads)
        elif place.bias or place.role in ("norm_1", "norm_2", "norm"):
            self._add(place, begin, np.square(rows, dtype=np.float64))
        else:
            self._add(place, begin, squared_matvec(rows, self._input(place), threads=threads))
        self._seen[name] = begin + len(rows)
        if place.role == "embedding" and self._seen[name] == self._shapes[name][0]:
            self._residual /= self._shapes[name][0]

    def _start(self, place: Place) -> None:
        """Make room for a tensor's output, and forget what only earlier ones depended on."""
        if place.role in ("norm_1", "norm_2", "norm"):
            self._inputs.clear()
            self._outputs.clear()
        if not place.bias and place.role not in ("embedding", "o", "down"):
            self._outputs[place.role] = np.zeros(self._shapes[place.name][0])

    def _add(self, place: Place, begin: int, values: Vector) -> None:
        if place.role == "o":
            self._residual[begin : begin + len(values)] += ATTENTION_SHARE * values
        elif place.role == "down":
            self._residual[begin : begin + len(values)] += values
        else:
            self._outputs[place.role][begin : begin + len(values)] += values

    def _input(self, place: Place) -> Vector:
        """Mean square of each input channel of a linear module."""
        stage = {"q": "norm_1", "k": "norm_1", "v": "norm_1", "gate": "norm_2", "up": "norm_2"}
        key = stage.get(place.role, place.role)
        if key not in self._inputs:
            self._check_seen(place)
            self._inputs[key] = self._compute(key)
        return self._inputs[key]

    def _compute(self, key: str) -> Vector:
        outputs = self._outputs
        if key == "o":
            per_head = outputs["v"].reshape(-1, self._layout.head_dim)
            return np.repeat(per_head, self._layout.queries_per_value, axis=0).reshape(-1)
        if key == "down":
            return silu_second_moment(outputs["gate"]) * outputs["up"]
        gain = outputs["norm" if key == "head" else key]
        return gain * self._residual / (float(self._residual.mean()) + self._layout.epsilon)

    def _check_seen(self, place: Place) -> None:
        for name in self._layout.before(place):
            rows = self._shapes[name][0]
            if self.needs(name) and self._seen.get(name) != rows:
                raise PlanError(
                    f"the second moments for {place.name} need {name}, which was not read before"
                    " it; keep that tensor, or choose equal weights"
                )


def silu_second_moment(variance: Vector) -> Vector:
    """E[silu(s)^2] for normal s of mean 0 and the given variances (Gauss-Hermite, 32 nodes)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(_HERMITE_NODES)
    points = np.sqrt(variance)[:, None] * nodes
    # silu(s) = s / (1 + exp(-s)); the tanh form cannot overflow.
    values = np.square(points * 0.5 * (1.0 + np.tanh(0.5 * points)))
    expected: Vector = (values * weights).sum(axis=1) / weights.sum()
    return expected
