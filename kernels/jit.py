"""The one way in which this package compiles: lazy, cached, and bound to IEEE arithmetic.

No kernel is compiled at import, and none uses fastmath: sums run in an order that the source fixes
(explicit lanes where speed asks for them), and the only functions are + - * / and sqrt, which IEEE
754 rounds exactly. So the bytes of a sketch depend neither on the number of threads nor on the
vector width of the machine.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core.caching import FunctionCache

F = TypeVar("F", bound=Callable[..., Any])


@cache
def sources_digest(folder: Path) -> str:
    """Digest of every module in `folder`: any of them may hold a constant frozen into a kernel.

    The kernels below `gpu` are not compiled here.
    """
    digest = hashlib.sha256()
    for path in sorted((*folder.glob("*.py"), *folder.glob("decoder/*.py"))):
        text = path.read_bytes()
        digest.update(f"{path.name} {len(text)} ".encode() + text)
    return digest.hexdigest()[:12]


class _Cache(FunctionCache):
    """Numba's cache of compiled code, with a key that is the same in every process.

    Numba's own holds a pickle of the values that a closure encloses, and a compiled function among
    them is pickled with a number drawn in each process: the code would be compiled again each time.
    """

    def _index_key(self, sig: Any, codegen: Any) -> tuple[Any, ...]:
        return sig, codegen.magic_tuple(), _enclosed(self._py_func)


def _enclosed(function: Any) -> str:
    """What a function is made of: its name, and the values that it encloses."""
    cells = (cell.cell_contents for cell in function.__closure__ or ())
    values = (_enclosed(v.py_func) if hasattr(v, "py_func") else repr(v) for v in cells)
    return f"{function.__qualname__}({', '.join(values)})"


def jit(function: F) -> F:
    """Compile an entry point at its first call, without the GIL, and keep its code on disk.

    Numba's cache looks only at the file of the function that is called, and would miss an edit in
    a module whose functions are compiled into it; so the name under which the code is kept carries
    a digest of all sources. Numba fixes that name here, at decoration, so the sources are read when
    the first kernel is imported: about a millisecond, beside seconds for Numba itself. Where no
    cache folder can be written (a read-only installation without a home) the code is compiled
    again in each process. What a function encloses must be told apart by its `repr`.
    """
    function.__qualname__ = f"{function.__qualname__}_{sources_digest(Path(__file__).parent)}"
    compiled: Any = numba.njit(nogil=True, error_model="numpy")(function)
    # Without a folder to write to there is no cache.
    with contextlib.suppress(RuntimeError):
        compiled._cache = _Cache(function)  # type: ignore[no-untyped-call]
    return cast(F, compiled)


def inner(function: F) -> F:
    """Compile a function that only compiled functions call, as a part of each of them."""
    options: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return cast(F, numba.njit(error_model="numpy", **options)(function))
