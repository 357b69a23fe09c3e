"""Load, choose and drop the task adapters of a loaded sketch.

The functions behind the methods of the same meaning that `methods` gives to models.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sketchconv.adapters.base import base_of
from sketchconv.adapters.batch import BASE
from sketchconv.adapters.luts import as_tensor, check_names, same
from sketchconv.errors import AdapterError
from sketchconv.runtime.sketch import SketchModule

ATTRIBUTE = "_sketch_adapters"


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """What `load_adapter` did.

    Attributes:
        name: the adapter's name.
        weights: weights whose LUTs are the adapter's own; all others share the base's.
        nbytes: memory of these LUTs.
    """

    name: str
    weights: tuple[str, ...]
    nbytes: int


@dataclass(slots=True)
class Adapters:
    """The adapters of one model.

    Attributes:
        loaded: by name, in the order in which they were loaded.
        active: the chosen one; None for the base.
        enabled: whether the active one is in use; `disable_adapters` puts the base there.
        changes: counts what may have changed the LUTs in place.
    """

    loaded: dict[str, LoadedAdapter] = field(default_factory=dict)
    active: str | None = None
    enabled: bool = True
    changes: int = 0


def adapters_of(model: Any) -> Adapters:
    """The adapters of a model, as they are; empty where none was ever loaded."""
    found = vars(model).get(ATTRIBUTE)
    return found if isinstance(found, Adapters) else Adapters()


def load(
    model: Any,
    source: str | os.PathLike[str] | Mapping[str, Any],
    name: str = "default",
    trainable: bool = False,
) -> LoadedAdapter:
    """Load an adapter and make it the active one, as transformers does with those of peft.

    Args:
        model: a model that was loaded from a sketch.
        source: a delta (a `.sktch` file, a folder or a hub id), or the LUTs themselves: weight name
            -> whole LUT ``[rows, groups, 2**bits]`` of the base's dtype.
        name: what to call it.
        trainable: give the adapter a LUT of its own for every weight, with gradients. Otherwise
            what equals the base is the base's, and gradients are off.

    Raises:
        AdapterError: the name is taken, or the adapter does not fit this model. The model is left
            as it was.
        DeltaError: a delta is damaged, or was made for another base.
    """
    known = adapters_of(model)
    if not isinstance(name, str) or not name.strip() or name == BASE:
        raise AdapterError(f"an adapter cannot be called {name!r}")
    if name in known.loaded:
        raise AdapterError(f"there is an adapter {name!r} already; delete it, or choose a name")
    luts = source if isinstance(source, Mapping) else _from_file(model, source)
    own = _own_luts(model, luts, trainable)
    for module, lut in own.values():
        module.add_table(name, lut, trainable)
    nbytes = sum(lut.nbytes for _, lut in own.values())
    done = LoadedAdapter(name, tuple(own), nbytes)
    setattr(model, ATTRIBUTE, known)
    known.loaded[name] = done
    activate(model, name)
    return done


def _from_file(model: Any, path: str | os.PathLike[str]) -> Mapping[str, Any]:
    from sketchconv.adapters.files import read

    return read(model, path)


def _own_luts(
    model: Any, luts: Mapping[str, Any], trainable: bool
) -> dict[str, tuple[SketchModule, Tensor]]:
    check_names(luts)
    base = base_of(model)
    found: dict[str, tuple[SketchModule, Tensor]] = {}
    for weight, given in luts.items():
        module = base.module(model, weight)
        old = module.lut_of(BASE)
        lut = as_tensor(weight, given, old)
        if trainable or not same(lut, old):
            found[weight] = module, lut
    if trainable:
        for weight, path in base.paths.items():
            module = model.get_submodule(path)
            if weight not in found and isinstance(module, SketchModule):
                found[weight] = module, module.lut_of(BASE).detach().clone()
    return found


def activate(model: Any, name: str | list[str]) -> None:
    """Make `name` the active adapter.

    Raises:
        AdapterError: there is no such adapter, or more than one is named.
    """
    if isinstance(name, list | tuple):
        if len(name) != 1:
            raise AdapterError(f"one adapter can be active, not {len(name)}: merge deltas instead")
        name = name[0]
    adapters = _known(model, name)
    adapters.active = name
    if adapters.enabled:
        _switch(model, name)


def delete(model: Any, names: str | list[str]) -> None:
    """Drop adapters and their memory. If the active one is among them the base is active.

    With the last one goes that they were disabled: the next to be loaded is in use, and without
    any `enable_adapters` is refused. (After peft's the next would be out of use without a sign.)

    Raises:
        AdapterError: one of them is not there; then none is dropped.
    """
    each = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    for name in each:
        adapters = _known(model, name)
    for name in each:
        for module in _modules(model):
            module.drop_table(name)
        del adapters.loaded[name]
        if adapters.active == name:
            adapters.active = None
        adapters.changes += 1
        adapters.enabled = adapters.enabled or not adapters.loaded


def active(model: Any) -> list[str]:
    """The name of the active adapter, or nothing; as in peft also while adapters are disabled."""
    name = adapters_of(model).active
    return [] if name is None else [name]


def enable(model: Any, enabled: bool) -> None:
    """Put the active adapter in use, or the base without forgetting which one is active."""
    adapters = adapters_of(model)
    adapters.enabled = enabled
    _switch(model, adapters.active if enabled and adapters.active else BASE)


def state(model: Any, name: str | None = None) -> dict[str, Tensor]:
    """The LUTs that an adapter has of its own, by weight name: what `deltas.create` takes.

    Raises:
        AdapterError: there is no such adapter.
    """
    wanted = adapters_of(model).active if name is None else name
    adapters = _known(model, wanted)
    base = base_of(model)
    weights = adapters.loaded[str(wanted)].weights
    return {w: base.module(model, w).lut_of(str(wanted)).detach() for w in weights}


def check_known(model: Any, names: Any) -> tuple[str, ...]:
    """`adapter_names` of a batch as a tuple.

    Raises:
        AdapterError: it is no list of names of adapters of this model, or is empty.
    """
    if isinstance(names, str) or not names:
        raise AdapterError(f"adapter_names is a list, one name per sample, got {names!r}")
    known = adapters_of(model).loaded
    for name in names:
        if name != BASE and name not in known:
            raise _missing(known, name)
    return tuple(names)


def _known(model: Any, name: Any) -> Adapters:
    adapters = adapters_of(model)
    if name not in adapters.loaded:
        raise _missing(adapters.loaded, name)
    return adapters


def _missing(known: Mapping[str, Any], name: Any) -> AdapterError:
    there = ", ".join(known) or "none"
    return AdapterError(f"there is no adapter {name!r} in this model; loaded: {there}")


def _modules(model: Any) -> Iterator[SketchModule]:
    return (module for module in model.modules() if isinstance(module, SketchModule))


def _switch(model: Any, name: str) -> None:
    adapters_of(model).changes += 1
    with torch.inference_mode(False):
        for module in _modules(model):
            module.switch(name)
