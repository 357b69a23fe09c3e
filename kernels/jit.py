"""The one way in which this package compiles: lazy, cached, and bound to IEEE arithmetic.

No kernel is compiled at import, and none uses fastmath: sums run in an order that the source fixes
(explicit lanes where speed asks for them), and the only functions are + - * / and sqrt, which IEEE
754 rounds exactly. So the bytes of a sketch depend neither on the number of threads nor on the
vector width of the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def jit(function: F) -> F:
    """Compile `function` at its first call, without the GIL, and keep the machine code on disk.

    Where no cache folder can be written (a read-only installation without a home) the code is
    compiled again in each process.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    compiled: Any
    try:
        compiled = numba.njit(cache=True, **options)(function)
    except RuntimeError:
        compiled = numba.njit(**options)(function)
    return cast(F, compiled)
