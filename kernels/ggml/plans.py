"""What each kind searches: levels, scales, and the starts of the search.

The first start maps the extremes to the extremes, and so finds exact fits; the others were chosen
greedily out of a fine grid, each for what it adds to those before it, on
gaussian and heavy-tailed sub-blocks, half of them with log-normal weights (sigma 1). A start of
`ScalePlan` is the level that the largest weight is mapped to, in parts of the lowest level; one of
`AffinePlan` says how many codes below 0 the smallest weight lies, and above the top the largest.
Long groups also start from their standard deviation, times each of `spreads`: the best steps of
uniform, gaussian, Laplace and Student (4 and 3 degrees) distributions, and some between; for levels
that are not symmetric of both signs, as the largest weight may not matter most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from sketchconv.kernels.ggml.kinds import CODEBOOK
from sketchconv.kernels.ggml.levels import Codebook, Levels, Whole


@dataclass(frozen=True, slots=True)
class ScalePlan:
    """A search of steps; `starts` are reciprocals of levels.

    `units` divide the largest step of a super-block into the unit of its scales; none where a
    sub-block is a block of its own.
    """

    size: int
    levels: Levels
    starts: tuple[float, ...]
    rounds: int = 1
    kept: int = 1
    group: int = 1
    scale_low: float = 0.0
    scale_high: float = 0.0
    units: tuple[float, ...] = ()
    spreads: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class AffinePlan:
    """A search of steps and bases; `below` keeps the bases from being above zero."""

    size: int
    top: float
    starts: tuple[tuple[float, float], ...]
    rounds: int = 1
    kept: int = 1
    group: int = 1
    scale_high: float = 0.0
    units: tuple[float, ...] = ()
    spreads: tuple[float, ...] = ()

    @property
    def below(self) -> bool:
        """Whether a base above zero cannot be stored."""
        return bool(self.units)

    @property
    def levels(self) -> Levels:
        """The codes."""
        return Whole(0.0, self.top)


Plan = ScalePlan | AffinePlan


def _levels(lowest: float, *parts: float) -> tuple[float, ...]:
    return tuple(1 / (part * lowest) for part in parts)


_FOUR = (
    (0.0, 0.0), (-0.2, 0.2), (-0.5, -0.2), (0.0, 0.5), (-0.5, 0.2), (0.7, 0.2), (0.1, 0.7),
    (-0.1, 0.3), (0.0, -0.7), (-0.2, 1.5), (0.0, -0.1), (0.7, -0.7), (0.7, -0.1), (-0.5, 0.7),
    (-0.9, 0.1), (0.3, 0.1),
)  # fmt: skip
_FIVE = (
    (0.0, 0.0), (-0.1, 0.1), (-0.2, -0.7), (0.2, 0.3), (-0.3, -0.2), (0.7, -0.2), (0.7, -0.7),
    (0.3, -0.7), (0.0, 0.8), (-0.2, -0.1), (0.0, 0.2), (-0.6, -0.2), (0.7, 0.1), (0.2, -0.1),
    (-0.2, 0.6), (0.0, -0.7),
)  # fmt: skip
_TWO = (
    (0.0, 0.0), (-0.4, 0.4), (-0.5, -0.1), (-0.1, 0.7), (-0.5, 0.2), (0.0, 1.1), (-0.2, 0.5),
    (-1.2, 0.5), (0.7, 0.2), (0.0, -0.1), (-1.5, 0.1),
)  # fmt: skip
_SIX = _levels(-32, 1, 0.965, 0.9375, 0.9075, 0.88, 0.84, 1.0175, 0.82, 0.78, 0.9775)
_THREE = _levels(-4, 1, 1.05, 1.19, 0.81, 0.95, 1.3, -1.13, 1.11, 0.73)
_CODEBOOK = _levels(
    -127, 1, 1.03, -0.91, 1.1, 0.95, 0.86, -0.96, 1.05, -0.87, 1.26, 0.99, 0.81, -1.04, -0.73, 1.16
)

PLANS: Final[Mapping[str, Plan]] = MappingProxyType(
    {
        "Q4_0": ScalePlan(
            32,
            Whole(-8, 7),
            _levels(-8, 1, 1.03, 1.1, 0.91, 0.98, 1.27, 1.06, 0.77, 0.86, -1.05, 1.17),
            1,
            3,
        ),
        "Q5_0": ScalePlan(
            32,
            Whole(-16, 15),
            _levels(-16, 1, 1.015, 0.94, 1.06, 0.88, 0.99, 1.13, 0.82, 1.03, 0.96, 0.92),
            1,
            3,
        ),
        # Not -128: kernels of llama.cpp that negate codes could not.
        "Q8_0": ScalePlan(
            32,
            Whole(-127, 127, signed=True),
            _levels(-127, 1, 0.9845, 0.968, 0.9915, 0.96, 0.9765, 1.0045, 0.998),
            1,
            2,
        ),
        "IQ4_NL": ScalePlan(32, Codebook(tuple(map(float, CODEBOOK))), _CODEBOOK, 1, 3),
        "Q3_K": ScalePlan(16, Whole(-4, 3), _THREE[:7], 0, 2, 16, -32, 31, (-32, -31)),
        "Q6_K": ScalePlan(16, Whole(-32, 31), _SIX[:7], 0, 2, 16, -128, 127, (-128,)),
        "IQ4_XS": ScalePlan(
            32, Codebook(tuple(map(float, CODEBOOK))), _CODEBOOK, 0, 3, 8, -32, 31, (-32, -31)
        ),
        "Q4_1": AffinePlan(32, 15, _FOUR, 1, 3),
        "Q5_1": AffinePlan(32, 31, _FIVE, 1, 3),
        "Q2_K": AffinePlan(16, 3, _TWO[:9], 0, 2, 16, 15, (15, 14)),
        "Q4_K": AffinePlan(32, 15, _FOUR[:12], 0, 3, 8, 63, (63, 60)),
        "Q5_K": AffinePlan(32, 31, _FIVE[:10], 0, 3, 8, 63, (63, 60)),
    }
)
"""The search of every kind."""

_SPREADS = (0.23, 0.29, 0.34, 0.4, 0.47, 0.56, 0.7)
_FIVE_SPREADS = (0.11, 0.15, 0.19, 0.24, 0.3, 0.38, 0.5)
_CODEBOOK_SPREADS = (0.0135, 0.018, 0.0225, 0.0275, 0.0325, 0.0425, 0.05)

GRIDS: Final[Mapping[str, Plan]] = MappingProxyType(
    {
        "iq4_nl": ScalePlan(
            32,
            Codebook(tuple(map(float, CODEBOOK))),
            _CODEBOOK,
            2,
            3,
            spreads=(*_CODEBOOK_SPREADS, *(-k for k in _CODEBOOK_SPREADS)),
        ),
        "symmetric": ScalePlan(
            32,
            Whole(-8, 7),
            _levels(-8, 1, 1.03, 1.1, 0.91, 0.98, 1.27, 1.06, 0.77, 0.86, -1.05, 1.17),
            2,
            3,
            spreads=(*_SPREADS, *(-k for k in _SPREADS)),
        ),
        "affine": AffinePlan(32, 15, _FOUR, 2, 3, spreads=_SPREADS),
        "affine_5": AffinePlan(32, 31, _FIVE, 2, 3, spreads=_FIVE_SPREADS),
        "symmetric_5": ScalePlan(
            32,
            Whole(-16, 15),
            _levels(-16, 1, 1.015, 0.94, 1.06, 0.88, 0.99, 1.13, 0.82, 1.03, 0.96, 0.92),
            2,
            3,
            spreads=(*_FIVE_SPREADS, *(-k for k in _FIVE_SPREADS)),
        ),
        # Not -128, as in Q8_0. So many levels need no start from the spread.
        "symmetric_8": ScalePlan(
            32,
            Whole(-127, 127, signed=True),
            _levels(-127, 1, 0.9845, 0.968, 0.9915, 0.96, 0.9765, 1.0045, 0.998),
            2,
            2,
        ),
    }
)
"""The searches of shaped LUTs, whose groups may have any number of columns."""
