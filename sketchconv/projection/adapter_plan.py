"""Which modules of the dense model a low-rank adapter must change, and what they are called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sketchconv.errors import ProjectionError

if TYPE_CHECKING:
    from sketchconv.architecture import ModelMap
    from sketchconv.sources.overlay import OverlaidSketch


@dataclass(frozen=True, slots=True)
class AdapterWeight:
    """A weight that the adapter changes.

    Attributes:
        name: the sketch's name.
        module: the path of its module in transformers' model.
        shape: ``(out, in)``.
    """

    name: str
    module: str
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """An adapter before its numbers are known.

    Attributes:
        weights: what it changes, by name.
        classes: transformers' classes of the model, as its config names them.
        targets: what peft is told to change: last parts of module paths where these name the
            weights and nothing else, else the whole paths.
        transposed: whether modules hold their weights as ``[in, out]``, which peft has to know.
        heads: attention heads, heads of keys and values, and rows of one head.
        base_id: the dense model, as the sketch remembers it.
    """

    weights: tuple[AdapterWeight, ...]
    classes: tuple[str, ...]
    targets: tuple[str, ...]
    transposed: bool
    heads: tuple[int, int, int]
    base_id: str


def plan_adapter(source: OverlaidSketch, names: Iterable[str]) -> AdapterPlan:
    """Find the modules of the weights that a delta changes.

    Args:
        source: the base with the delta.
        names: of the weights.

    Raises:
        ProjectionError: a weight that no linear module of the dense model holds by itself, such as
            an embedding or one of fused experts.
        ArchitectureError: transformers does not know the model.
    """
    from sketchconv.architecture import open_skeleton

    skeleton, model = open_skeleton(source.config(), source.infos)
    weights = tuple(_weight(source, model, name) for name in sorted(names))
    config: Any = skeleton.config.get_text_config()
    return AdapterPlan(
        weights,
        (type(skeleton).__name__,),
        _targets(weights, _linear_paths(skeleton)),
        any(weight.name in model.transposed for weight in weights),
        _heads(config),
        str(source.origin.get("id") or ""),
    )


def _weight(source: OverlaidSketch, model: ModelMap, name: str) -> AdapterWeight:
    path = model.modules.get(name, "").removesuffix(".weight")
    if name in model.experts:
        why = "is one of fused experts"
    elif name in model.embeddings:
        why = "is an embedding"
    elif name not in (*model.linears, *model.heads) or not path:
        why = "is not the weight of a linear module"
    else:
        return AdapterWeight(name, path, source.records[name].shape)
    raise ProjectionError(
        f"{name}: {why}, and an adapter of linear modules cannot hold its change; export with "
        "--to gguf or --to safetensors, which are exact"
    )


def _linear_paths(skeleton: Any) -> set[str]:
    from sketchconv.calibration.linears import is_linear

    return {path for path, module in skeleton.named_modules() if is_linear(module)}


def _targets(weights: Iterable[AdapterWeight], linears: set[str]) -> tuple[str, ...]:
    paths = {weight.module for weight in weights}
    leaves = {path.rpartition(".")[2] for path in paths}
    named = {path for path in linears if path.rpartition(".")[2] in leaves}
    return tuple(sorted(leaves if named == paths else paths))


def _heads(config: Any) -> tuple[int, int, int]:
    """Of models without attention heads: none."""
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    if not heads:
        return 0, 0, 0
    grouped = int(getattr(config, "num_key_value_heads", None) or heads)
    return heads, grouped, int(getattr(config, "head_dim", None) or config.hidden_size // heads)


def peft_config(plan: AdapterPlan, rank: int) -> Mapping[str, Any]:
    """`adapter_config.json` of a plain LoRA adapter whose factors are to be added as they are."""
    causal = plan.classes[0].endswith(("ForCausalLM", "LMHeadModel"))
    return {
        "base_model_name_or_path": plan.base_id or None,
        "bias": "none",
        "fan_in_fan_out": plan.transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": list(plan.targets),
        "task_type": "CAUSAL_LM" if causal else None,
        "use_dora": False,
        "use_rslora": False,
    }
