"""Fused experts of a model without weights, taken apart by structure into linear modules.

transformers keeps a mixture's experts as two parameters of three dimensions, whatever the
checkpoint holds. A sketch has one record for each matrix, and calibration looks at the inputs of
each, so the skeleton gets a module of its own in their place.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

FUSED = ("gate_up_proj", "down_proj")
_MEMBER = re.compile(r".+\.\d+\.(?P<leaf>[^.]+)\.weight")
# What `use_experts_implementation` says of experts that compute down(act(gate(x)) * up(x)).
_PLAIN = {"has_gate": True, "is_concatenated": True, "is_transposed": False, "has_bias": False,
          "has_post_expert_norm": False}  # fmt: skip


def unfold_experts(
    model: PreTrainedModel, names: Iterable[str], stacked: Collection[str]
) -> dict[str, int]:
    """Replace fused experts by `runtime.experts.Experts`, in place.

    Only those whose weights are among `names` are replaced; all of these or none.

    Args:
        model: on the meta device.
        names: tensors of the checkpoint.
        stacked: those of them that have three dimensions ``[E, out, in]``.

    Returns:
        The stacked tensors that now belong to linear modules, each with E.
    """
    fused = {path: m for path, m in model.named_modules() if _is_fused(m)}
    if not fused:
        return {}
    leaves, stacks = _leaves(model, fused, names, frozenset(stacked))
    if any(why_not(fused[path]) or not _complete(found) for path, found in leaves.items()):
        return {}
    from sketchconv.runtime.experts import Experts

    for path, found in leaves.items():
        model.set_submodule(path, Experts(fused[path], found))
    return {name: int(fused[path].down_proj.shape[0]) for name, path in stacks.items()}


def _is_fused(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters(recurse=False))
    return all(n in parameters and parameters[n].dim() == 3 for n in FUSED)


def why_not(module: Any) -> str | None:
    """Why fused experts cannot be taken apart; None where they can."""
    from transformers.integrations import moe

    if set(module._parameters) != set(FUSED) or not callable(getattr(module, "act_fn", None)):
        return "they have parameters beside gate_up_proj and down_proj, or no activation"
    odd = [n for n, value in _PLAIN.items() if bool(getattr(module, n, not value)) is not value]
    if odd:
        return f"their {odd[0]} is another than that of plain gated experts"
    gate = getattr(type(module), "_apply_gate", None)
    if gate is not getattr(moe, "_default_apply_gate", None):
        return "they gate in a way of their own"
    count, rows, columns = module.gate_up_proj.shape
    if tuple(module.down_proj.shape) != (count, columns, rows // 2) or rows % 2:
        return "their shapes do not fit together"
    return None


def _complete(leaves: Mapping[str, str]) -> bool:
    return set(leaves) in ({"gate", "up", "down"}, {"gate_up", "down"})


def _leaves(
    model: PreTrainedModel, fused: Collection[str], names: Iterable[str], stacked: frozenset[str]
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Role -> name of the linear module by path of the experts; path by stacked tensor."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    roles = {p: r for c in converters for p, r in _roles(c).items()}
    state, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, dict[str, str]] = {}
    stacks: dict[str, str] = {}
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        path, _, parameter = target.rpartition(".")
        if path not in fused or parameter not in FUSED:
            continue
        member = _MEMBER.fullmatch(name)
        leaf = name.rpartition(".")[2]
        if pattern is None and name in stacked and leaf == parameter:
            stacks[name] = path
            role = leaf.removesuffix("_proj")
        elif member is not None and pattern in roles:
            role, leaf = roles[pattern], member["leaf"]
        else:
            role, leaf = "unknown", name
        found.setdefault(path, {}).setdefault(role, leaf)
    return found, stacks


def _roles(converter: Any) -> dict[str, str]:
    """Role of each source pattern, for converters that only stack, or stack and join."""
    steps = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
    sources, targets = converter.source_patterns, converter.target_patterns
    target = targets[0].rpartition(".")[2] if len(targets) == 1 else ""
    if steps == [("MergeModulelist", 0)] and len(sources) == 1 and target in FUSED:
        return {sources[0]: target.removesuffix("_proj")}
    joined = steps == [("MergeModulelist", 0), ("Concatenate", 1)]
    if joined and len(sources) == 2 and target == "gate_up_proj":
        return {sources[0]: "gate", sources[1]: "up"}
    return {}


def experts_of_weights(model: PreTrainedModel, names: Mapping[str, str]) -> dict[str, str]:
    """Path of the experts' module for every weight of an expert.

    Args:
        model: after `unfold_experts`.
        names: checkpoint name -> the model's name.
    """
    from sketchconv.runtime.experts import experts_of

    paths = experts_of(model).keys()
    inside = {source: name.rsplit(".", 3)[0] for source, name in names.items()}
    return {source: path for source, path in inside.items() if path in paths}


def routers(model: PreTrainedModel) -> set[str]:
    """Paths of linear modules beside experts with an output for each, or one: they stay dense."""
    from torch import nn

    from sketchconv.runtime.experts import experts_of

    found = set()
    for path, experts in experts_of(model).items():
        home = path.rpartition(".")[0]
        for name, module in model.get_submodule(home).named_children():
            sizes = (1, experts.num_experts)
            if isinstance(module, nn.Linear) and module.out_features in sizes:
                found.add(f"{home}.{name}")
    return found
