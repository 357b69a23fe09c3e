"""Tied weights of which one end is sketched: two modules, one sketch."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from sketchconv.errors import LoadError
from sketchconv.runtime.modules import SketchModule
from sketchconv.runtime.replace import WEIGHT, copy_scale
from sketchconv.runtime.tied import TiedSketchEmbedding, TiedSketchLinear


def tie_modules(
    model: PreTrainedModel,
    ties: Mapping[str, str],
    stored: Collection[str],
    dtype: torch.dtype,
) -> None:
    """Let the module at the absent end of each tie use the sketch at its other end.

    Args:
        model: with its sketch modules in place.
        ties: weight keys of the model, each mapped to the one that it is tied to.
        stored: keys for which the checkpoint has a tensor or a sketch.
        dtype: dtype of the model.

    transformers ties parameters by name; a sketched weight has none, so these ties are taken out of
    its lists. A tie with both ends stored is none: each module keeps its own.

    Raises:
        LoadError: the absent end is a module that cannot share a sketch, or of another shape.
    """
    dropped = set()
    for first, second in ties.items():
        if not any(_is_sketch(model, key) for key in (first, second)):
            continue
        dropped.add(first)
        if first in stored and second in stored:
            continue
        absent, owner = (first, second) if _is_sketch(model, second) else (second, first)
        path = absent.removesuffix(WEIGHT)
        source = model.get_submodule(owner.removesuffix(WEIGHT))
        if not _is_sketch(model, absent) and isinstance(source, SketchModule):
            model.set_submodule(path, _tied(model.get_submodule(path), source, absent, dtype))
    _forget(model, dropped)


def _is_sketch(model: PreTrainedModel, key: str) -> bool:
    path = key.removesuffix(WEIGHT)
    return path != key and isinstance(model.get_submodule(path), SketchModule)


def _tied(module: nn.Module, owner: SketchModule, key: str, dtype: torch.dtype) -> SketchModule:
    weight = getattr(module, "weight", None)
    shape = tuple(weight.shape) if isinstance(weight, torch.Tensor) else None
    if shape != (owner.rows, owner.columns):
        raise LoadError(f"{key} is {shape}, but tied to a sketch of {(owner.rows, owner.columns)}")
    if isinstance(module, nn.Linear):
        bias = module.bias is not None
        return TiedSketchLinear(owner, bias=bias, device="meta", dtype=dtype)
    if isinstance(module, nn.Embedding):
        padding = module.padding_idx
        tied = TiedSketchEmbedding(owner, padding_idx=padding, device="meta", dtype=dtype)
        copy_scale(module, tied)
        return tied
    raise LoadError(f"{key} is tied to a sketch, but belongs to a {type(module).__name__}")


def _forget(model: PreTrainedModel, dropped: Collection[str]) -> None:
    """Take ties out of the lists of `model` and of the models inside it."""
    if not dropped:
        return
    for path, part in model.named_modules():
        if not isinstance(part, PreTrainedModel):
            continue
        prefix = f"{path}." if path else ""
        known = getattr(part, "all_tied_weights_keys", {})
        kept = {key: owner for key, owner in known.items() if prefix + key not in dropped}
        if kept != known:
            # The list of the class is left alone; `tie_weights` reads that of the instance first.
            part._tied_weights_keys, part.all_tied_weights_keys = dict(kept), kept
