"""A dense model, read from a checkpoint or a sketch, as the content of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sketchconv.architecture import ModelMap, open_skeleton
from sketchconv.errors import ArchitectureError
from sketchconv.export.architectures import Change, ExportArchitecture, find_architecture
from sketchconv.export.content import GgufContent
from sketchconv.export.hyperparameters import Hyperparameters, hyperparameters
from sketchconv.export.llama_cpp_names import check_model_name
from sketchconv.export.metadata import general_keys, model_name, provenance_keys, read_card
from sketchconv.export.plan import ExportPlan
from sketchconv.export.planner import plan_export
from sketchconv.export.recipe import ExportRecipe
from sketchconv.export.rows import SourceRows
from sketchconv.export.shaped import block_types
from sketchconv.export.tokenizer import TokenizerKeys, tokenizer_keys
from sketchconv.job import equal_ties
from sketchconv.sources.base import Source
from sketchconv.sources.sketch import SketchSource


def from_model(source: Source, recipe: ExportRecipe) -> tuple[SourceRows, GgufContent]:
    """Plan an export of a model; reads no weights but two tied ones, to compare them.

    Raises:
        ArchitectureError: not an architecture that can be exported, or a setting of it.
        SourceError: a tokenizer that cannot be exported.
        PlanError: a pattern of the recipe names nothing.
    """
    raw = source.config()
    architecture = find_architecture(_classes(raw), source.id)
    skeleton, model = open_skeleton(raw, source.infos)
    if model.unsupported:
        name = next(iter(model.unsupported))
        raise ArchitectureError(f"{name}: fused experts cannot be exported to GGUF yet")
    config: Any = skeleton.config
    settings = hyperparameters(architecture, config)
    embedding = _embedding_rows(source, model, architecture)
    tokenizer = tokenizer_keys(
        source.files(), config.to_dict(), embedding, source.id, recipe.tokenizer_pre
    )
    plan = plan_export(
        source.infos,
        model,
        architecture,
        recipe,
        head_rows=_head_rows(config),
        heads=_heads(config),
        rope=settings.tensors,
        equal=equal_ties(source, model),
        notes=(*settings.notes, *tokenizer.notes),
        blocks=block_types(source),
    )
    values = _values(source, architecture, recipe, plan, settings, tokenizer)
    return SourceRows(source), GgufContent(plan, values, tokenizer.kind)


def _classes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The config's own classes, or else the causal model of its type."""
    named = config.get("architectures")
    if isinstance(named, list) and named:
        return tuple(str(name) for name in named)
    from transformers.models.auto import modeling_auto

    table = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    found = table.get(str(config.get("model_type")))
    return (found,) if isinstance(found, str) else tuple(found or ())


def _embedding_rows(source: Source, model: ModelMap, architecture: ExportArchitecture) -> int:
    for name, module in model.modules.items():
        if architecture.globals.get(module) == "token_embd.weight":
            return source.infos[name].shape[0]
    raise ArchitectureError(f"{source.id}: no token embedding among the tensors")


def _head_rows(config: Any) -> int:
    heads = int(config.num_attention_heads)
    return int(getattr(config, "head_dim", None) or config.hidden_size // heads)


def _heads(config: Any) -> dict[Change, int]:
    heads = int(config.num_attention_heads)
    grouped = getattr(config, "num_key_value_heads", None) or heads
    return {"rotary_q": heads, "rotary_k": int(grouped)}


def _values(
    source: Source,
    architecture: ExportArchitecture,
    recipe: ExportRecipe,
    plan: ExportPlan,
    settings: Hyperparameters,
    tokenizer: TokenizerKeys,
) -> dict[str, bytes]:
    origin = _origin(source)
    model_id = str(origin.get("model") or source.id)
    card = {} if isinstance(source, SketchSource) else read_card(source.paths[0])
    name = recipe.name or model_name(model_id)
    check_model_name(name, tokenizer.tokens)
    types = plan.types()
    return {
        **general_keys(architecture.name, name, plan.parameters, plan.main_type(), card, model_id),
        **provenance_keys(source.id, source.format, types, origin),
        **settings.values,
        **tokenizer.values,
    }


def _origin(source: Source) -> dict[str, Any]:
    """What is known of where the weights come from, for the provenance keys."""
    if not isinstance(source, SketchSource):
        return {} if source.revision is None else {"revision": source.revision}
    made = source.origin
    found = {"model": made.get("id"), "revision": made.get("revision")}
    found.update(digest=made.get("digest"), recipe=dict(source.recipe))
    return {key: value for key, value in found.items() if value}
