"""Adapters from files: deltas, checked against the base that is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sketchconv.errors import AdapterError, HubError, SourceError
from sketchconv.formats.rules import ADAPTER_CONFIG


def is_delta(source: Any) -> bool:
    """Whether `source` is a delta by its looks: LUTs in memory, a `.sktch` file, or our folder.

    On the Hub `user/repo:task.sktch` is one; `user/repo` may be an adapter of peft, and is left to
    it: use `load_adapter(hub.fetch("user/repo"))`.
    """
    if isinstance(source, Mapping):
        return True
    if not isinstance(source, str | os.PathLike):
        return False
    path = Path(source)
    return path.suffix == ".sktch" or (path / ADAPTER_CONFIG).is_file()


def read(model: Any, path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The whole LUTs of a delta, after its binding to the loaded base was checked.

    The digests of the base's indices are those that its file stated when it was loaded; its LUTs
    are hashed as they are now, so that a base which was trained since is refused.

    Raises:
        DeltaError: the delta was made for another base, or is damaged.
        AdapterError: there is no such delta.
        HubError: the Hub refused.
    """
    from sketchconv.adapters.base import base_of
    from sketchconv.adapters.batch import BASE
    from sketchconv.deltas import binding_of, resolve
    from sketchconv.hub.fetching import fetch

    base = base_of(model)
    try:
        path = fetch(path)
    except HubError:
        raise
    except SourceError:
        raise AdapterError(f"{path}: there is no such delta") from None
    needed = binding_of(path)
    needed.require(base.binding, Path(path).name, f"the loaded model ({model.name_or_path})")
    luts = {name: base.module(model, name).lut_of(BASE).detach().cpu() for name in needed.weights}
    return resolve(path, luts)
