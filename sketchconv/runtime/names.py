"""Names in a checkpoint against names in a model, by the rules that transformers loads by."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stored tensor goes.

    Args:
        key: the name in the model's state under which transformers puts it, or misses it.
        there: whether the model has this key.
        merged: whether transformers computes the value from this tensor and others.
    """

    key: str
    there: bool
    merged: bool


def places(
    model: PreTrainedModel, state: dict[str, Tensor], names: Collection[str]
) -> dict[str, Place]:
    """The place of each stored tensor among `state`, the model's state.

    Renamings, and adding or dropping the prefix of the base model, follow transformers' loader.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    prefix = model.base_model_prefix
    found = {}
    for name in sorted(names, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if key not in state and name in state:
            key, pattern = rename_source_key(name, [], [], prefix, state)
        elif key not in state and pattern is not None:
            # What it would be merged into has been taken apart (`unfold`).
            key, pattern = rename_source_key(name, renamings, [], prefix, state)
        found[name] = Place(key, key in state, pattern is not None)
    return found
