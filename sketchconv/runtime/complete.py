"""Whether a checkpoint and a model fit together, decided before a weight is loaded."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import Tensor
from transformers import PreTrainedModel

from sketchconv.errors import LoadError
from sketchconv.formats.tensors import TensorInfo
from sketchconv.runtime.names import Place

# Buffers that older checkpoints stored and models now compute.
_COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
_SKETCHED = (".sketch_index", ".sketch_lut", ".sketch_scale")
_SHOWN = 3


def check_complete(
    model: PreTrainedModel,
    state: Mapping[str, Tensor],
    tensors: Mapping[str, TensorInfo],
    at: Mapping[str, Place],
) -> None:
    """Check every stored tensor against the model, and every tensor of the model against them.

    A model of the class that was compressed must match exactly. Another class (a base model
    against one with a head) may lack stored tensors, and may have whole parts of its own, which
    transformers initialises: a part is a child of the model or of its base model.

    Args:
        model: with its sketch modules in place.
        state: the model's state.
        tensors: the stored tensors that belong to the model.
        at: the place of each in `state`.

    Raises:
        LoadError: a tensor is missing, foreign or mis-shaped.
    """
    same = type(model).__name__ in (model.config.architectures or [type(model).__name__])
    _check_shapes(state, tensors, at)
    foreign = [name for name in tensors if not at[name].there]
    foreign = _unmatched(foreign, [*(model._keys_to_ignore_on_load_unexpected or ()), *_COMPUTED])
    if foreign and same:
        raise LoadError(f"tensors that {type(model).__name__} does not have: {_some(foreign)}")
    loaded = {place.key for place in at.values() if place.there}
    missing = [key for key in state if key not in loaded and not _tied(model, key, loaded)]
    if any(place.merged for place in at.values()):  # values computed from several tensors
        missing = [key for key in missing if key.endswith(_SKETCHED)]
    missing = _unmatched(missing, model._keys_to_ignore_on_load_missing or ())
    if not same:
        parts = {_part(model, key) for key in loaded}
        missing = [key for key in missing if _part(model, key) in parts]
    if missing:
        raise LoadError(f"tensors that {type(model).__name__} needs are missing: {_some(missing)}")


def _check_shapes(
    state: Mapping[str, Tensor], tensors: Mapping[str, TensorInfo], at: Mapping[str, Place]
) -> None:
    for name, info in tensors.items():
        place = at[name]
        if place.there and not place.merged and tuple(state[place.key].shape) != info.shape:
            expected = list(state[place.key].shape)
            raise LoadError(f"{name} is {list(info.shape)}, the model expects {expected}")


def _tied(model: PreTrainedModel, key: str, loaded: Collection[str]) -> bool:
    """Whether transformers fills `key` from another key that is loaded."""
    ties = model.all_tied_weights_keys
    sources = {ties.get(key)} | {target for target, source in ties.items() if source == key}
    siblings = {target for target, source in ties.items() if source == ties.get(key)}
    return any(name in loaded for name in (sources | siblings) - {key})


def _part(model: PreTrainedModel, key: str) -> str:
    prefix = f"{model.base_model_prefix}."
    if key.startswith(prefix):
        return prefix + key.removeprefix(prefix).split(".")[0]
    return key.split(".")[0]


def _unmatched(names: Collection[str], patterns: Collection[str]) -> list[str]:
    return [name for name in names if not any(re.search(p, name) for p in patterns)]


def _some(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
