"""Gradients of a product with a sketch, for CUDA and ROCm: neither `W` nor its gradient is stored.

The references are `grad_input` and `grad_lut` of `sketchconv.kernels.plain`.
"""

from __future__ import annotations

from sketchconv.kernels.gpu import input_gradient, lut_gradient
from sketchconv.kernels.gpu.catalog import Variant
from sketchconv.kernels.gpu.input_gradient import grad_input
from sketchconv.kernels.gpu.lut_gradient import grad_lut

__all__ = ["grad_input", "grad_lut", "variants"]

CASES = (  # bits, columns of a group, element
    (1, 4096, "bf16"),
    (3, 1376, "bf16"),
    (4, 4096, "bf16"),
    (7, 45, "bf16"),
    (8, 4096, "bf16"),
    (3, 4096, "fp32"),
    (4, 4096, "fp32"),
)


def variants() -> tuple[Variant, ...]:
    """What is compiled ahead of time: wide groups, and narrow ones that are no whole tiles."""
    found: list[Variant] = []
    for case in CASES:
        found += input_gradient.variants(*case)
        found.append(lut_gradient.variant(*case))
    return tuple(found)
