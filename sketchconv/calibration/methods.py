"""Methods: the published recipes, and ours, as settings of one solver."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from sketchconv.errors import RecipeError

Grid = Literal["affine", "kmeans"]
Solver = Literal["ours", "sklearn"]


@dataclass(frozen=True, slots=True)
class Method:
    """How one weight is solved.

    Attributes:
        name: as ``--method`` takes it.
        grid: ``"affine"``: equal steps from the least to the greatest weight of a group (and 0);
            ``"kmeans"``: weighted one-dimensional k-means.
        solver: of the k-means; ``"sklearn"`` is what the published code calls (needs scikit-learn).
        powers: k-means weights ``diag(U)**-power``; U is the upper Cholesky factor of ``H^-1``.
            0: equal weights. With several, each row starts from the grid that its error after
            compensation calls best: a row with a few outliers can be lost with any one of them.
        damping: added to the diagonal of H, as a part of its mean, where nothing is held out.
        dampings: those to choose from on held-out statistics; empty: always `damping`.
        act_order: columns by falling diagonal of H instead of left to right.
        compensate: round column by column with the error compensated.
        rounds: most rounds of coordinate descent and LUT refit.
        sweeps: sweeps of coordinate descent before the refit of a round.
        last_sweeps: and after it, with the LUTs as they are stored.
        refit_steps: conjugate gradient steps of a refit.
        asymmetric: aim at the dense model's outputs from the compressed model's inputs.
        ridge: regularisation of that target, as a part of the mean of H's diagonal.
        coarse_ridge: the same at 3 bits and fewer, where more of it holds better on other text. KL
            with 0.3 and 0.6 on text like the calibration's, then on other text: .049 and .052, .213
            and .214 at 4 bits; .192 and .196, .92 and .87 at 3; .630 and .638, 3.25 and 3.18 at 2.
    """

    name: str
    grid: Grid = "kmeans"
    solver: Solver = "ours"
    powers: tuple[float, ...] = (0.0,)
    damping: float = 0.0
    dampings: tuple[float, ...] = ()
    act_order: bool = False
    compensate: bool = False
    rounds: int = 0
    sweeps: int = 1
    last_sweeps: int = 1
    refit_steps: int = 0
    asymmetric: bool = False
    ridge: float = 0.3
    coarse_ridge: float = 0.6


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            # Round to nearest on a grid of equal steps.
            Method("rtn", grid="affine"),
            # K-means alone, each weight to its nearest entry.
            Method("kmeans"),
            # Frantar et al. 2022, arXiv 2210.17323, with the act-order of its code.
            Method("gptq", grid="affine", damping=0.01, act_order=True, compensate=True),
            # Zhang and Shrivastava 2024, arXiv 2407.10032, non-uniform; its README's settings.
            Method("leanquant", solver="sklearn", powers=(4.0,), damping=0.1, act_order=True,
                   compensate=True),
            Method("sketch", powers=(2.5, 1.0), damping=0.03, dampings=(0.03, 0.1, 0.3),
                   act_order=True, compensate=True, rounds=2, refit_steps=3, asymmetric=True),
        )
    }
)  # fmt: skip

DEFAULT_METHOD = "sketch"
COARSE_BITS = 3
# For second moments that were propagated and not measured: see `sketchconv/sensitivities/whole.py`.
WITHOUT_DATA = Method("without data", damping=0.1, act_order=True, compensate=True, rounds=1,
                      refit_steps=6)  # fmt: skip


def method_named(name: str) -> Method:
    """The method of that name.

    Raises:
        RecipeError: there is none.
    """
    if name not in METHODS:
        raise RecipeError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]


def ridge_at(method: Method, bits: int) -> float:
    """The method's regularisation of asymmetric targets for indices of so many bits."""
    return method.coarse_ridge if bits <= COARSE_BITS else method.ridge


def needs_statistics(method: Method) -> bool:
    """Whether the method looks at the layer's inputs at all."""
    return method.compensate or method.rounds > 0 or any(method.powers) or method.asymmetric
