"""The LUTs of an adapter, as they are given: checked against the base and made its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sketchconv.errors import AdapterError


def as_tensor(name: str, given: Any, base: Tensor) -> Tensor:
    """A LUT of an adapter as a tensor of its own, of the base's dtype and on its device.

    Args:
        name: the weight, for messages.
        given: tensor or array of the base's shape and dtype; for bfloat16 an array is uint16.
        base: the LUT of the base, ``[rows, groups, 2**bits]``.

    Returns:
        A copy, so that training what was given on does not change the adapter.

    Raises:
        AdapterError: shape or dtype is another, or a value is not finite.
    """
    lut = _tensor(name, given, base)
    if lut.shape != base.shape or lut.dtype is not base.dtype:
        raise AdapterError(
            f"the adapter's LUT of {name} is {lut.dtype} {list(lut.shape)}, expected that of the "
            f"base, {base.dtype} {list(base.shape)}"
        )
    if base.is_meta:
        raise AdapterError(f"the LUT of {name} is not in memory (offloaded?)")
    bad = int((~torch.isfinite(lut)).sum())
    if bad:
        raise AdapterError(f"the adapter's LUT of {name} has {bad} values that are not finite")
    return torch.empty_like(base, requires_grad=False).copy_(lut)


def _tensor(name: str, given: Any, base: Tensor) -> Tensor:
    if isinstance(given, Tensor):
        return given.detach()
    if not isinstance(given, np.ndarray):
        raise AdapterError(f"the adapter's LUT of {name} is a {type(given).__name__}, not a tensor")
    if base.dtype is torch.bfloat16 and given.dtype == np.uint16:
        return torch.from_numpy(given.view(np.int16).copy()).view(torch.bfloat16)
    if given.dtype.kind != "f":
        raise AdapterError(f"the adapter's LUT of {name} is {given.dtype}, expected {base.dtype}")
    return torch.from_numpy(np.array(given, order="C"))


def same(first: Tensor, second: Tensor) -> bool:
    """Whether two LUTs of one shape and dtype are the same, bit for bit."""
    size = {2: torch.int16, 4: torch.int32}[first.element_size()]
    return torch.equal(first.contiguous().view(size), second.contiguous().view(size))


def check_names(luts: Mapping[Any, Any]) -> None:
    """Refuse keys that are no names."""
    for name in luts:
        if not isinstance(name, str):
            raise AdapterError(f"an adapter maps names of weights to LUTs, got the key {name!r}")
