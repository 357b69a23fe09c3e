"""From a model's tensors and a recipe to the tensors of a GGUF file; pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from sketchconv.architecture import ModelMap
from sketchconv.errors import PlanError
from sketchconv.export.architectures import Change, ExportArchitecture
from sketchconv.export.encoders import ENCODERS, Encoder, fitting
from sketchconv.export.plan import ExportPlan, ExportStep
from sketchconv.export.recipe import AUTO, ExportRecipe
from sketchconv.export.rope import RopeTensors
from sketchconv.export.shaped import KEPT_ROWS
from sketchconv.formats.gguf_layout import GgufInfo
from sketchconv.formats.gguf_types import GGML_TYPES
from sketchconv.formats.tensors import TensorInfo

# Matrices that llama.cpp never quantizes: added or convolved as they are, or routers of experts.
_LEFT_ALONE: Final = re.compile(
    r"position_embd|token_types|ffn_gate_inp|ssm_conv1d|shortconv\.conv|time_mix_|attn_rel_b"
    r"|altup|laurel|per_layer_model_proj|patch_embd|patch_merger|rel_pos|conv1d"
)
_HEADS: Final = frozenset({"token_embd.weight", "output.weight"})
_KEPT: Final = frozenset({"F32", "F16", "BF16"})


def plan_export(
    infos: Mapping[str, TensorInfo],
    model: ModelMap,
    architecture: ExportArchitecture,
    recipe: ExportRecipe,
    *,
    head_rows: int,
    heads: Mapping[Change, int],
    rope: RopeTensors,
    equal: Mapping[str, str],
    notes: tuple[str, ...] = (),
    blocks: Mapping[str, str] | None = None,
) -> ExportPlan:
    """Decide every tensor of the output.

    Args:
        infos: the source's tensors.
        model: what transformers' class says of them.
        architecture: their GGUF names and changes.
        recipe: the types that the user wants.
        head_rows: rows of one attention head.
        heads: how many heads q and k have, by change.
        rope: tensors of rotary factors that are added.
        equal: tied weights that are stored twice: name -> the one to keep.
        notes: hints that are known already.
        blocks: types in which tensors of the source can be packed without loss.

    Raises:
        PlanError: a pattern names nothing, or rows do not fit the heads.
        ArchitectureError: a tensor that GGUF has no place for.
    """
    left_out = {name: f"the same bytes as {kept}" for name, kept in equal.items()}
    left_out.update((name, "the model has no such tensor") for name in model.extra)
    targets = {
        n: architecture.gguf_name(model.modules.get(n, n)) for n in infos if n not in left_out
    }
    recipe = recipe.spelled_out(targets.values())
    steps = [_synthetic(name, values) for name, values in rope.items()]
    for name, target in targets.items():
        info = infos[name]
        transposed = name in model.transposed
        change: Change = "transpose" if transposed else architecture.change(target)
        shape = info.shape[::-1] if transposed else info.shape
        _check_heads(target, shape, change, heads, head_rows)
        own = (blocks or {}).get(name) if change in KEPT_ROWS else None
        encoder, reason = choose_type(target, shape, info.dtype, recipe, name, own)
        found, packed = GgufInfo(target, shape, encoder.type), encoder.type.name == own
        steps.append(ExportStep(found, reason, name, change, head_rows, verbatim=packed))
    _check_choices(steps, recipe)
    return ExportPlan(tuple(_ordered(steps)), left_out, notes)


def choose_type(
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    recipe: ExportRecipe,
    source: str = "",
    own: str | None = None,
) -> tuple[Encoder, str]:
    """The type of one tensor, and why.

    Args:
        name: its GGUF name.
        shape: rows first.
        dtype: of an exact plain copy.
        recipe: what the user wants.
        source: its Hugging Face name, which patterns may name too.
        own: the type in whose blocks the source has it.
    """
    if not is_matrix(name, shape):
        return ENCODERS["F32"], "vectors, norms and the like are always F32"
    choice = recipe.choice_for(name, source)
    wanted, reason = recipe.type, "asked for"
    if choice is not None:
        wanted, reason = choice.type, f"asked for: {choice.pattern}"
    elif recipe.type == AUTO:
        wanted, reason = dtype if dtype in _KEPT else "F32", "exact"
        if own is not None:
            wanted, reason = own, "the sketch's own codes and scales"
    elif name in _HEADS and ENCODERS[wanted].head is not None:
        wanted, reason = str(ENCODERS[wanted].head), f"embeddings and output beside {wanted}"
    encoder = fitting(ENCODERS[wanted], shape[-1])
    if encoder.type.name != wanted:
        reason = f"rows of {shape[-1]} do not fit the blocks of {wanted}"
    return encoder, reason


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor may have a type of the user's choice; llama.cpp needs the others in F32."""
    named = name.endswith(".weight") and not name.endswith("_norm.weight")
    return len(shape) >= 2 and named and _LEFT_ALONE.search(name) is None


def _synthetic(name: str, values: tuple[float, ...]) -> ExportStep:
    info = GgufInfo(name, (len(values),), GGML_TYPES["F32"])
    return ExportStep(info, "rotary frequencies of the config", values=values)


def _check_heads(
    name: str,
    shape: tuple[int, ...],
    change: Change,
    heads: Mapping[Change, int],
    head_rows: int,
) -> None:
    if change in heads and (shape[0] != heads[change] * head_rows or head_rows % 2):
        raise PlanError(
            f"{name}: {shape[0]} rows, expected {heads[change]} heads of {head_rows} rows"
        )


def _check_choices(steps: list[ExportStep], recipe: ExportRecipe) -> None:
    for choice in recipe.choices:
        named = [s for s in steps if choice.names(s.name, s.source or "")]
        if not any(is_matrix(s.name, s.info.shape) for s in named):
            what = "only vectors and norms, which stay F32" if named else "no tensor"
            raise PlanError(
                f"pattern {choice.pattern!r} names {what}; names look like"
                " 'blk.0.ffn_down.weight' or 'ffn_down'"
            )


def _ordered(steps: list[ExportStep]) -> list[ExportStep]:
    """Tensors outside the blocks first, then block by block, as llama.cpp lists them."""

    def key(step: ExportStep) -> int:
        parts = step.name.split(".")
        return int(parts[1]) if parts[0] == "blk" else -1

    return sorted(steps, key=key)
