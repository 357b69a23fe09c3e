"""Which sketch of a file bears the sentinel: one whose name a program takes for a dense weight."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sketchconv.formats.rules import WEIGHT_SUFFIX


def sentinel_name(names: Collection[str], source: Mapping[str, Any]) -> str | None:
    """The first name in byte order, if it can be of a weight that the source has by itself.

    A member of a stack has a name that no model asks for, so that a wrong shape under it would
    stop nobody.

    Args:
        names: of the sketches of one file.
        source: the document's `source`.
    """
    stacked = source.get("stacked")
    stacks: Collection[str] = stacked if isinstance(stacked, dict) else ()
    own = (name for name in names if _stack_of(name) not in stacks)
    return min(own, default=min(names, default=None))


def _stack_of(name: str) -> str:
    """The tensor that a weight would be a member of.

    >>> _stack_of("mlp.experts.3.down_proj.weight")
    'mlp.experts.down_proj'
    """
    stem, _, leaf = name.removesuffix(WEIGHT_SUFFIX).rpartition(".")
    home, _, number = stem.rpartition(".")
    return f"{home}.{leaf}" if number.isdecimal() else ""
