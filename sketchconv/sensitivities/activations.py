"""What an activation makes of a normal variable: its mean, mean square and mean slope."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]
Values = npt.NDArray[np.float64]

_NODES = 32
_ROOT = np.sqrt(2 / np.pi)
_CUBE = 0.044715


@dataclass(frozen=True, slots=True)
class Activated:
    """Moments of f(s) for normal s, each ``[n]``: E f, E f^2 and E f'."""

    mean: Vector
    square: Vector
    slope: Vector


def _sigmoid(s: Values) -> Values:
    result: Values = 0.5 * (1.0 + np.tanh(0.5 * s))  # cannot overflow
    return result


def _silu(s: Values) -> tuple[Values, Values]:
    gate = _sigmoid(s)
    return s * gate, gate * (1.0 + s * (1.0 - gate))


def _gelu(s: Values) -> tuple[Values, Values]:
    """The form with tanh, which is within 5e-4 of the exact one."""
    inner = np.tanh(_ROOT * (s + _CUBE * s**3))
    slope = 0.5 * (1.0 + inner) + 0.5 * s * (1.0 - inner**2) * _ROOT * (1.0 + 3.0 * _CUBE * s**2)
    return 0.5 * s * (1.0 + inner), slope


def _quick_gelu(s: Values) -> tuple[Values, Values]:
    gate = _sigmoid(1.702 * s)
    return s * gate, gate * (1.0 + 1.702 * s * (1.0 - gate))


def _relu(s: Values) -> tuple[Values, Values]:
    return np.maximum(s, 0.0), (s > 0).astype(np.float64)


ACTIVATIONS: Mapping[str, Callable[[Values], tuple[Values, Values]]] = {
    **dict.fromkeys(("silu", "swish"), _silu),
    **dict.fromkeys(("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python"), _gelu),
    "quick_gelu": _quick_gelu,
    "relu": _relu,
}


def activated(name: str, mean: Vector, variance: Vector) -> Activated:
    """Moments of an activation of normal variables, by Gauss-Hermite quadrature in 32 nodes.

    Args:
        name: one of `ACTIVATIONS`.
        mean, variance: of the variables, ``[n]``.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    weights = weights / weights.sum()
    value, slope = ACTIVATIONS[name](mean[:, None] + np.sqrt(variance)[:, None] * nodes)
    return Activated(
        (value * weights).sum(axis=1),
        (np.square(value) * weights).sum(axis=1),
        (slope * weights).sum(axis=1),
    )
