"""`triton.jit` with a type, so that kernels pass a strict type checker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton


def jit(function: Callable[..., Any]) -> Any:
    """Mark `function` as a Triton kernel or helper; nothing is compiled until it is launched."""
    return triton.jit(function)
