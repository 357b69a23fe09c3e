"""What a model's architecture says of the tensors in its checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sketchconv.errors import ArchitectureError
from sketchconv.formats.tensors import TensorInfo
from sketchconv.positions import longest_text
from sketchconv.skeleton import build_skeleton, candidate_classes
from sketchconv.sources.config import refuse_quantized
from sketchconv.sources.forms import expanded
from sketchconv.tensor_names import Names, match_names
from sketchconv.unfold import experts_of_weights, routers, unfold_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shape = tuple[int, ...]
_SHOWN = 5
_DIGITS = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class ModelMap:
    """The role of every tensor of a checkpoint; all names are the checkpoint's own.

    Attributes:
        linears: weights of `nn.Linear` (and `Conv1D`) modules inside the base model.
        heads: weights of output embeddings and task heads: linear, outside the base model.
        embeddings: weights of `nn.Embedding` modules.
        aliases: tied weights that are absent: absent name -> stored name.
        ties: tied weights that are both stored: name -> the one it is tied to.
        parameters: shape of every tensor that goes unchanged into the model, buffers included.
        modules: the model's own name of each of those tensors.
        transposed: the linears that are stored as [in, out] (GPT-2's `Conv1D`).
        stacked: tensors ``[E, out, in]`` of fused experts, with E; `linears` and the like have the
            names of their matrices (`sources.forms`).
        experts: weight of an expert -> path of the module of all experts.
        unsupported: tensors of merged modules, of fused experts that `unfold` does not know, and of
            linear modules with a forward of their own: not sketched; with parameter counts.
        extra: tensors that the model does not have, such as old buffers; they can be dropped.
        longest: tokens of the longest text that it is made for; None: no limit.
    """

    linears: tuple[str, ...]
    heads: tuple[str, ...]
    embeddings: tuple[str, ...]
    aliases: Mapping[str, str]
    ties: Mapping[str, str]
    parameters: Mapping[str, Shape]
    modules: Mapping[str, str]
    transposed: tuple[str, ...]
    unsupported: Mapping[str, int]
    extra: tuple[str, ...]
    stacked: Mapping[str, int] = field(default_factory=dict)
    experts: Mapping[str, str] = field(default_factory=dict)
    longest: int | None = None


def map_model(config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> ModelMap:
    """Classify a checkpoint's tensors by building its model without weights.

    Code that a checkpoint brings along is never run.

    Args:
        config: the content of `config.json`.
        infos: the checkpoint's tensors.

    Raises:
        ArchitectureError: unknown to transformers, or config and tensors do not fit together.
        SourceError: the config says that the checkpoint is quantized.
    """
    return open_skeleton(config, infos)[1]


def open_skeleton(
    config: Mapping[str, Any], infos: Mapping[str, TensorInfo]
) -> tuple[PreTrainedModel, ModelMap]:
    """The model without weights, of the class that a checkpoint fits, and its map.

    Raises:
        ArchitectureError, SourceError: as `map_model`.
    """
    refuse_quantized(dict(config), "config.json")
    classes = candidate_classes(config)
    for cls in classes[:-1]:
        # Without a class in the config: the first one whose weights are all there.
        try:
            model = build_skeleton(config, infos, cls)
            return model, _map(model, infos)
        except ArchitectureError:
            continue
    model = build_skeleton(config, infos, classes[-1])
    return model, _map(model, infos)


def _map(model: PreTrainedModel, infos: Mapping[str, TensorInfo]) -> ModelMap:
    stacked = unfold_experts(model, infos, [n for n, i in infos.items() if len(i.shape) == 3])
    infos = expanded(infos.values(), stacked)
    names = match_names(model, infos)
    aliases, ties = _tied(model, names)
    _check_missing(model, names, aliases)
    _check_surplus(model, names)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    parameters = {source: expected[name] for source, name in names.plain.items()}
    _check_shapes(model, infos, parameters)
    roles = _roles(model)

    def of_role(*wanted: str) -> tuple[str, ...]:
        return tuple(s for s, name in names.plain.items() if roles.get(name) in wanted)

    return ModelMap(
        linears=of_role("linear", "transposed"),
        heads=of_role("head"),
        embeddings=of_role("embedding"),
        aliases=aliases,
        ties=ties,
        parameters=parameters,
        modules=names.plain,
        transposed=of_role("transposed"),
        unsupported={
            source: math.prod(infos[source].shape)
            for source in infos
            if source in names.converted
            or (len(infos[source].shape) == 3 and "expert" in source and source in names.plain)
            or roles.get(names.plain.get(source, "")) == "special"
        },
        extra=names.extra,
        stacked=stacked,
        experts=experts_of_weights(model, names.plain),
        longest=longest_text(model),
    )


def _roles(model: PreTrainedModel) -> dict[str, str]:
    """Role by the model's own weight name."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from sketchconv.runtime.replace import has_sketched_form

    prefix = model.base_model_prefix
    base = f"{prefix}." if prefix and getattr(model, prefix, None) not in (None, model) else ""
    output: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    roles, routing = {}, routers(model)
    for name, module in model.named_modules(remove_duplicate=False):
        if name in routing:
            role = "other"
        elif isinstance(module, nn.Embedding):
            # Others, such as learned positions with an offset, are copied like any tensor.
            role = "embedding" if has_sketched_form(module) else "other"
        elif isinstance(module, Conv1D):
            role = "transposed" if has_sketched_form(module) else "special"
        elif isinstance(module, nn.Linear) and not has_sketched_form(module):
            role = "special"
        elif isinstance(module, nn.Linear):
            role = "linear" if name.startswith(base) and module is not output else "head"
        else:
            continue
        roles[f"{name}.weight"] = role
    return roles


def _tied(model: PreTrainedModel, names: Names) -> tuple[dict[str, str], dict[str, str]]:
    """Aliases (one stored) and ties (both stored) among the weights that the model ties."""
    stored = {name: source for source, name in names.plain.items()}
    groups: dict[str, list[str]] = {}
    for target, source in (model.all_tied_weights_keys or {}).items():
        groups.setdefault(source, [source]).append(target)
    aliases: dict[str, str] = {}
    ties: dict[str, str] = {}
    for members in groups.values():
        present = [member for member in members if member in stored]
        if not present:
            continue
        kept = stored[present[0]]
        aliases.update((member, kept) for member in members if member not in stored)
        ties.update((stored[member], kept) for member in present[1:])
    return aliases, ties


def _check_missing(model: PreTrainedModel, names: Names, aliases: Mapping[str, str]) -> None:
    ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_missing or ()]
    missing = [
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if name not in names.present
        and name not in aliases
        and not any(pattern.search(name) for pattern in ignored)
    ]
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (" ..." if len(missing) > _SHOWN else "")
        raise ArchitectureError(
            f"{type(model).__name__} needs {len(missing)} tensors that the checkpoint lacks:"
            f" {shown}; is the download complete, and the right config.json?"
        )


def _check_surplus(model: PreTrainedModel, names: Names) -> None:
    """Refuse layers that the config does not count: they would silently be left out."""
    known = {_DIGITS.sub("#", name) for name in names.plain}
    ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_unexpected or ()]
    empty = _empty_lists(model)
    surplus = [
        name
        for name in names.extra
        if (_DIGITS.sub("#", name) in known or name.startswith(empty))
        and not any(p.search(name) for p in ignored)
    ]
    if surplus:
        raise ArchitectureError(
            f"{surplus[0]}: the config of {type(model).__name__} has no such layer"
            f" ({len(surplus)} such tensors); config.json and weights do not belong together"
        )


def _empty_lists(model: PreTrainedModel) -> tuple[str, ...]:
    """How names begin that belong to lists of layers of which the config counts none."""
    from torch import nn

    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and not len(m)]
    short = [name.removeprefix(f"{model.base_model_prefix}.") for name in lists]
    return tuple(f"{name}." for name in (*lists, *short))


def _check_shapes(
    model: PreTrainedModel, infos: Mapping[str, TensorInfo], parameters: Mapping[str, Shape]
) -> None:
    wrong = [name for name, shape in parameters.items() if infos[name].shape != shape]
    if wrong:
        name = wrong[0]
        raise ArchitectureError(
            f"{name}: the checkpoint has the shape {list(infos[name].shape)}, but the config of"
            f" {type(model).__name__} asks for {list(parameters[name])}"
            f" ({len(wrong)} such tensors); config.json and weights do not belong together"
        )
