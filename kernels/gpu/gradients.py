"""Gradients of a product with a sketch, for CUDA and ROCm: neither `W` nor its gradient is stored.

The references are `grad_input` and `grad_lut` of `sketchconv.kernels.plain`.
"""

from __future__ import annotations

from sketchconv.kernels.gpu import input_gradient, lut_gradient
from sketchconv.kernels.gpu.catalog import Variant
from sketchconv.kernels.gpu.input_gradient import grad_input
from sketchconv.kernels.gpu.lut_gradient import grad_lut

__all__ = ["grad_input", "grad_lut", "variants"]

CASES = ((1, 4096), (3, 4096), (3, 1376), (4, 4096), (7, 1376), (8, 4096))  # bits, group columns


def variants() -> tuple[Variant, ...]:
    """What is compiled ahead of time: one wide group, and narrow ones that are no whole tiles."""
    found: list[Variant] = []
    for element in ("bf16", "fp32"):
        for bits, group in CASES:
            found += input_gradient.variants(bits, group, element)
            found.append(lut_gradient.variant(bits, group, element))
    return tuple(found)
