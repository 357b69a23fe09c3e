"""The LUTs of one sketch module, by adapter: one is in place, the others are parked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sketchconv.adapters.batch import BASE

PREFIX = "sketch_luts."  # of the adapters' keys in a state dict


class Tables:
    """LUTs by adapter, of one module.

    The module's parameter is the LUT of `active`; `parked` holds all others, that of the base
    among them where an adapter is active. Adapters that are not here have the base's LUT.

    Attributes:
        active: whose LUT the module's parameter is.
        parked: LUTs that are not in place.
        checked: what the module knows of parked LUTs that it has used.
        plan: what it knows of the last mixed batch (`runtime.mixed`).
    """

    __slots__ = ("active", "checked", "parked", "plan")

    def __init__(self) -> None:
        self.active = BASE
        self.parked: dict[str, nn.Parameter] = {}
        self.checked: dict[str, Any] = {}
        self.plan: Any = None

    def forget(self) -> None:
        """Drop what is known of tensors: one of them changes."""
        self.checked.clear()
        self.plan = None

    def key(self, name: str) -> str:
        """The name under which the LUT of adapter `name` is here: its own, or the base's."""
        return name if name == self.active or name in self.parked else BASE

    def names(self) -> list[str]:
        """Adapters that have LUTs of their own here."""
        return [name for name in (self.active, *self.parked) if name != BASE]

    def park(self, name: str, lut: nn.Parameter) -> None:
        """Hold the LUT of one more adapter."""
        self.checked.pop(name, None)
        self.plan = None
        self.parked[name] = lut

    def drop(self, name: str) -> None:
        """Let go of a parked LUT, if there is one."""
        self.checked.pop(name, None)
        self.plan = None
        self.parked.pop(name, None)

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move the parked LUTs as `nn.Module._apply` moves parameters; they are never cast."""
        self.forget()
        for name, lut in self.parked.items():
            self.parked[name] = _moved(lut, fn)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tables:
        import copy

        made = Tables()
        made.active, made.parked = self.active, copy.deepcopy(self.parked, memo)
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {"active": self.active, "parked": self.parked}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.active, self.parked = state["active"], state["parked"]
        self.checked, self.plan = {}, None


def _moved(lut: nn.Parameter, fn: Callable[[Tensor], Tensor]) -> nn.Parameter:
    with torch.no_grad():
        data = fn(lut.data)
        if data.dtype is not lut.dtype:
            data = lut.data.to(data.device)
    if data.is_meta or lut.is_meta:  # the one change of device that a tensor cannot take in place
        return nn.Parameter(data, lut.requires_grad)
    lut.data = data
    if lut.grad is not None:
        lut.grad = lut.grad.to(data.device)
    return lut
