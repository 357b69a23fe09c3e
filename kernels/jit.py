"""The one way in which this package compiles: lazy, cached, and bound to IEEE arithmetic.

No kernel is compiled at import, and none uses fastmath: sums run in an order that the source fixes
(explicit lanes where speed asks for them). The solver's only functions are + - * / and sqrt, which
IEEE 754 rounds exactly, so that the bytes of a sketch depend neither on the number of threads nor
on the vector width of the machine. The kernels that run sketches also fuse products into sums where
the machine does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

from sketchconv.kernels.cache_names import separate

F = TypeVar("F", bound=Callable[..., Any])


@cache
def sources_digest(folder: Path) -> str:
    """Digest of every module in `folder`: any of them may hold a constant frozen into a kernel.

    The kernels below `gpu` are not compiled here.
    """
    digest = hashlib.sha256()
    for path in sorted(
        (*folder.glob("*.py"), *folder.glob("decoder/*.py"), *folder.glob("ggml/*.py"))
    ):
        text = path.read_bytes()
        digest.update(f"{path.name} {len(text)} ".encode() + text)
    return digest.hexdigest()[:12]


def jit(function: F) -> F:
    """Compile an entry point at its first call, without the GIL, and keep its code on disk.

    Numba's cache looks only at the file of the function that is called, and would miss an edit in
    a module whose functions are compiled into it; so the name under which the code is kept carries
    a digest of all sources. Numba fixes that name here, at decoration, so the sources are read when
    the first kernel is imported: about a millisecond, beside seconds for Numba itself. Where no
    cache folder can be written (a read-only installation without a home) the code is compiled
    again in each process.
    """
    function.__qualname__ = f"{function.__qualname__}_{sources_digest(Path(__file__).parent)}"
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    compiled: Any
    try:
        compiled = numba.njit(cache=True, **options)(function)
        separate(compiled)
    except (RuntimeError, AttributeError):
        compiled = numba.njit(**options)(function)
    return cast(F, compiled)


def inner(function: F) -> F:
    """Compile a function that only compiled functions call, as a part of each of them."""
    options: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return cast(F, numba.njit(error_model="numpy", **options)(function))
