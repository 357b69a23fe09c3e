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
import numpy as np

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


def variant(function: Callable[..., Any]) -> str:
    """Digest of the values that a function made by another one holds of it; "" where it has none.

    Raises:
        TypeError: a value has no text that names it alone.
    """
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return "_" + hashlib.sha256(_text(cells).encode()).hexdigest()[:12] if cells else ""


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_text, value))})"
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return f"{value.dtype.str}{value.shape}{value.tobytes().hex()}"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    raise TypeError(f"a kernel cannot be named by {value!r}, only by plain values, tuples, arrays")


def jit(function: F) -> F:
    """Compile an entry point at its first call, without the GIL, and keep its code on disk.

    Numba names the symbols of functions made by one factory by the types of their arguments and by
    the number that they happened to have in their process. Code from the disk then shares names
    with other code, and what is asked for by name (an address; what another module links to) is
    that which was loaded last: 4-bit rows were read by the code for 8 bits, silently. So the name
    of a function carries a digest of all that it holds of its factory.

    Numba's cache looks only at the file of the function that is called, and would miss an edit in
    a module whose functions are compiled into it; so the name under which the code is kept carries
    a digest of all sources. Numba fixes that name here, at decoration, so the sources are read when
    the first kernel is imported: about a millisecond, beside seconds for Numba itself. Where no
    cache folder can be written (a read-only installation without a home) the code is compiled
    again in each process.
    """
    digest = sources_digest(Path(__file__).parent)
    function.__qualname__ = f"{function.__qualname__}_{digest}{variant(function)}"
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    compiled: Any
    try:
        compiled = numba.njit(cache=True, **options)(function)
        separate(compiled)
    except (RuntimeError, AttributeError):
        compiled = numba.njit(**options)(function)
    return cast(F, compiled)


def inner(function: F) -> F:
    """Compile a function that only compiled functions call, as a part of each of them.

    Raises:
        TypeError: it was made by another function, and would share the names of its symbols with
            what that makes for other values (see `jit`).
    """
    if function.__closure__:
        raise TypeError(f"{function.__qualname__} holds values of the function that made it")
    options: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return cast(F, numba.njit(error_model="numpy", **options)(function))
