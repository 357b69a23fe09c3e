"""What a sketch module does with the LUTs of adapters: hold, switch, save and load them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sketchconv.adapters.batch import BASE
from sketchconv.adapters.tables import PREFIX, Tables
from sketchconv.kernels.packed import Packed
from sketchconv.runtime import locks

Ready = tuple[Tensor, Tensor, torch.dtype, Packed]


def fits(ready: Ready, index: Tensor, lut: Tensor) -> bool:
    """Whether a checked form is that of these tensors as they are now."""
    known_index, known_lut, dtype, packed = ready
    return (
        known_index is index
        and known_lut is lut
        and packed.index_pointer == index.data_ptr()
        and packed.lut_pointer == lut.data_ptr()
        and dtype is lut.dtype
    )


class Switching(nn.Module):
    """The part of a sketch module that knows of adapters.

    The parameter is the LUT that is in use; what else there is lies in `_tables`.
    """

    TABLE: str
    _tables: Tables
    _ready: Ready | None

    def tables(self) -> Tables:
        """The LUTs by adapter; tied modules have those of their owner."""
        return self._tables

    def add_table(self, name: str, lut: Tensor, trainable: bool = False) -> None:
        """Hold `lut` for adapter `name`, not yet in place."""
        with locks.places:
            self._tables.park(name, nn.Parameter(lut, requires_grad=trainable))

    def drop_table(self, name: str) -> None:
        """Let go of the LUT of adapter `name`; if it was in place, the base's is put there."""
        with locks.places:
            if self._tables.active == name:
                self.switch(BASE)
            self._tables.drop(name)

    def switch(self, name: str) -> None:
        """Put the LUT of adapter `name` in place: that of the base where it has none here."""
        with locks.places:
            tables = self._tables
            key, before = tables.key(name), tables.active
            if key == before:
                return
            lut = self._parameters[self.TABLE]
            if lut is None:
                raise RuntimeError("the sketch's tensors were removed from the module")
            if self._ready is not None:
                tables.checked[before] = self._ready
            tables.parked[before] = lut
            self._parameters[self.TABLE] = tables.parked.pop(key)
            self._ready = tables.checked.pop(key, None)
            tables.active, tables.plan = key, None

    def lut_of(self, name: str) -> Tensor:
        """The LUT of adapter `name` here, or the base's."""
        with locks.places:
            tables = self.tables()
            key = tables.key(name)
            return self._tensors()[1] if key == tables.active else tables.parked[key]

    def packed_of(self, name: str) -> Packed | None:
        """The checked form with the LUT of adapter `name`; None off the CPU."""
        with locks.places:
            tables = self.tables()
            key = tables.key(name)
            if key == tables.active:
                return self.packed()
            lut, known = tables.parked[key], tables.checked.get(key)
            if known is not None and fits(known, self._tensors()[0], lut):
                packed: Packed | None = known[3]
                return packed
            packed = self._pack(lut)
            if packed is not None:
                tables.checked[key] = (self._tensors()[0], lut, lut.dtype, packed)
            return packed

    def _tensors(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def packed(self) -> Packed | None:
        """The checked form of what is in place."""
        raise NotImplementedError

    def _pack(self, lut: Tensor) -> Packed | None:
        raise NotImplementedError

    def _save_tables(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """The base's LUT goes under the parameter's name, whatever is in place."""
        tables = self._tables
        luts = {tables.active: self._parameters.get(self.TABLE), **tables.parked}
        for name, lut in luts.items():
            if lut is not None:
                key = prefix + (self.TABLE if name == BASE else PREFIX + name)
                destination[key] = lut if keep_vars else lut.detach()

    def _load_tables(
        self, state: Any, prefix: str, assign: bool, unexpected: list[str], errors: list[str]
    ) -> None:
        """Take the adapters' LUTs out of a state dict; the base's is in place."""
        for name in self._tables.names():
            key = prefix + PREFIX + name
            if key not in state:
                continue
            if key in unexpected:
                unexpected.remove(key)
            given, lut = state[key], self._tables.parked[name]
            if given.shape != lut.shape:
                errors.append(f"{key} is {tuple(given.shape)}, expected {tuple(lut.shape)}")
            elif assign:
                self._tables.park(name, nn.Parameter(given, lut.requires_grad))
            else:
                with torch.no_grad():
                    lut.copy_(given)
