"""What is known of a layer's inputs without any data, for k-means and for compensation.

The error that a quantized weight w causes is proportional to the mean square of the input it is
multiplied with, so that mean square is its weight in k-means; and what its columns share decides
how they can make up for each other's errors. `sensitivities/` has both from the weights alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from sketchconv.formats.tensors import TensorInfo
from sketchconv.recipe import Weighting
from sketchconv.sensitivities.layout import find_layout

if TYPE_CHECKING:
    from sketchconv.calibration.factors import Factors

Vector = npt.NDArray[np.float64]
Rows = npt.NDArray[np.float32]


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

    @property
    def nbytes(self) -> int:
        """Most working memory, in bytes, beside the rows that are shown."""
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

    def observe(
        self,
        name: str,
        begin: int,
        rows: Rows,
        threads: int | None = None,
        *,
        matrix: bool = False,
    ) -> None:
        """Take in rows [begin, begin + len(rows)) of a tensor, as float32 [rows, ...].

        Args:
            name: of the tensor.
            begin: first row.
            rows: as they are stored, or with `matrix` rows of a linear weight as ``[out, in]``
                where the source stores its transpose.
            threads: no result depends on it; None takes every core.
            matrix: see there.
        """
        ...


@dataclass(frozen=True, slots=True)
class EqualWeights:
    """No preference between columns."""

    description: str
    order: tuple[str, ...] = ()
    nbytes: int = 0

    def needs(self, name: str) -> bool:
        """Nothing is needed."""
        return False

    def column_weights(self, name: str) -> Vector | None:
        """Equal weights for every tensor."""
        return None

    def factors(self, name: str) -> None:
        """Nothing is known of any input."""

    def observe(
        self,
        name: str,
        begin: int,
        rows: Rows,
        threads: int | None = None,
        *,
        matrix: bool = False,
    ) -> None:
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
        from sketchconv.sensitivities.whole import PropagatedCovariances

        return PropagatedCovariances(layout, infos)
    from sketchconv.sensitivities.columns import PropagatedMoments

    return PropagatedMoments(layout, infos)
