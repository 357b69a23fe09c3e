"""Which task each sample of the batch under way belongs to; known to the thread that runs it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

from torch import Tensor

BASE = "__base__"  # as in peft: the model without any adapter
Names: TypeAlias = tuple[str, ...]


class _Local(threading.local):
    """Names of the samples: `whole` for all forwards of a `generate`, `one` for one forward."""

    whole: Names | None = None
    one: Names | None = None


_local = _Local()


def current() -> Names | None:
    """The adapter of each sample of the batch that this thread computes; None: the active one."""
    return _local.one or _local.whole


def begin(names: Names) -> None:
    """The forward that begins is one of such samples."""
    _local.one = names


def end() -> None:
    """The forward is over."""
    _local.one = None


@contextmanager
def use(names: Names | None) -> Iterator[None]:
    """All forwards of this thread within the block are of such samples; None: of no mixed batch."""
    before = _local.whole, _local.one
    _local.whole, _local.one = names, None
    try:
        yield
    finally:
        _local.whole, _local.one = before


def spread(x: Tensor, names: Sequence[str]) -> Tensor:
    """`x` with a leading dimension that the samples divide; one row for all is repeated.

    Row r of N belongs to sample ``r * len(names) // N``: so it is with tokens in a row, with beams
    and with several returned sequences.

    Raises:
        ValueError: it cannot be told which rows belong to which sample.
    """
    rows, samples = x.shape[0] if x.dim() else 0, len(names)
    if rows % samples == 0:
        return x
    if rows == 1:  # positions, for instance
        return x.expand(samples, *x.shape[1:])
    raise ValueError(
        f"adapter_names has {samples} names, but a layer got {tuple(x.shape)}: its {rows} rows "
        "cannot be shared out among the samples; run one adapter at a time with set_adapter"
    )
