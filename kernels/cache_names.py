"""Names of the files that compiled code is kept in: no two processes ever share one.

Numba numbers the variants of a function as its index, read a moment before, has them. Two processes
that compile different variants at the same time take the same number, and then the index of one
names the code of the other: a kernel for 8 bits is read as that for 4, silently. It was seen to
happen. With names of its own for each process a variant may be compiled once more, and that is all.
"""

from __future__ import annotations

import os
import uuid
from typing import Any

_tokens: dict[int, str] = {}


def token() -> str:
    """A name of this process; another one after a fork."""
    return _tokens.setdefault(os.getpid(), uuid.uuid4().hex[:12])


class DataNames:
    """What stands where Numba keeps the pattern of a function's file names.

    Args:
        base: the function's part of the name.
    """

    def __init__(self, base: str) -> None:
        self.base = base

    def format(self, *, number: int) -> str:
        """The name of variant `number` that this process compiles."""
        return f"{self.base}.{token()}-{number}.nbc"


def separate(compiled: Any) -> None:
    """Give the dispatcher `compiled`, made with ``cache=True``, names of its own.

    Raises:
        AttributeError: this version of Numba keeps its cache in another way.
    """
    file = compiled._cache._cache_file
    base, suffix, _ = file._data_name_pattern.rpartition(".{number:d}.nbc")
    if not suffix:
        raise AttributeError(f"unknown names of cached code: {file._data_name_pattern!r}")
    file._data_name_pattern = DataNames(base)
