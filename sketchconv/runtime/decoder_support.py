"""Which models the compiled decoding step can run: those whose every module it knows exactly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sketchconv.adapters.methods import after_forward, before_forward
from sketchconv.runtime.modules import SketchEmbedding, SketchLinear
from sketchconv.runtime.shaped import ShapedLinear
from sketchconv.runtime.tied import TiedSketchEmbedding, TiedSketchLinear

# Class names' prefix by module: attention and norms of these are the llama kind.
FAMILIES = {
    "transformers.models.llama.modeling_llama": "Llama",
    "transformers.models.mistral.modeling_mistral": "Mistral",
    "transformers.models.qwen2.modeling_qwen2": "Qwen2",
    "transformers.models.qwen3.modeling_qwen3": "Qwen3",
}
HEAD_NORMS = ("Qwen3",)
# Kinds whose frequencies stay the same however long the text gets
ROTATIONS = ("default", "linear", "llama3", "yarn")
ATTENTIONS = ("eager", "sdpa")
LINEARS: tuple[type[nn.Module], ...] = (nn.Linear, SketchLinear, TiedSketchLinear, ShapedLinear)
EMBEDDINGS: tuple[type[nn.Module], ...] = (nn.Embedding, SketchEmbedding, TiedSketchEmbedding)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OWN_HOOKS = (before_forward, after_forward)  # of adapters, which the decoder knows
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")


def why_not(model: nn.Module) -> str | None:
    """Why the compiled step cannot run `model`; None where it can.

    The answer holds for the model as it is: hooks, adapters or training mode can change it.
    """
    kind = type(model)
    family = FAMILIES.get(kind.__module__)
    if family is None or kind.__name__ != f"{family}ForCausalLM":
        return f"{kind.__name__} is not a model that the compiled loop knows"
    for check in (_modules, _state, _tensors, _settings):
        reason = check(model, family)
        if reason is not None:
            return reason
    return None


def _expected(model: Any, family: str) -> dict[str, str | tuple[type[nn.Module], ...]]:
    """Class names or types by path, for every module of the model."""
    paths: dict[str, str | tuple[type[nn.Module], ...]] = {
        "": f"{family}ForCausalLM",
        "model": f"{family}Model",
        "model.embed_tokens": EMBEDDINGS,
        "model.layers": (nn.ModuleList,),
        "model.norm": f"{family}RMSNorm",
        "model.rotary_emb": f"{family}RotaryEmbedding",
        "lm_head": LINEARS,
    }
    heads = ("self_attn.q_norm", "self_attn.k_norm") if family in HEAD_NORMS else ()
    for number in range(model.config.num_hidden_layers):
        layer = f"model.layers.{number}"
        paths[layer] = f"{family}DecoderLayer"
        paths[f"{layer}.self_attn"] = f"{family}Attention"
        paths[f"{layer}.mlp"] = f"{family}MLP"
        paths[f"{layer}.mlp.act_fn"] = "SiLUActivation"
        for name in ("input_layernorm", "post_attention_layernorm", *heads):
            paths[f"{layer}.{name}"] = f"{family}RMSNorm"
        for name in _LINEAR_NAMES:
            paths[f"{layer}.self_attn.{name}"] = LINEARS
        for name in ("gate_proj", "up_proj", "down_proj"):
            paths[f"{layer}.mlp.{name}"] = LINEARS
    return paths


def _modules(model: Any, family: str) -> str | None:
    expected = _expected(model, family)
    found = dict(model.named_modules(remove_duplicate=False))
    for path in sorted(expected.keys() ^ found.keys()):
        there = "has a module too many" if path in found else "lacks a module"
        return f"the model {there}: {path}"
    home = type(model).__module__
    for path, wanted in expected.items():
        kind = type(found[path])
        if isinstance(wanted, str):
            ours = kind.__module__ in (home, "transformers.activations")
            right = ours and kind.__name__ == wanted and _own_forward(kind)
        else:
            right = kind in wanted
        if not right:
            return f"{path} is a {kind.__name__} of another kind than expected"
    return None


def _own_forward(kind: Any) -> bool:
    """Whether a class of transformers has the forward that was written for it."""
    return bool(getattr(kind.forward, "__module__", None) == kind.__module__)


def _state(model: Any, family: str) -> str | None:
    if model.training:
        return "the model is in training mode"
    for path, module in model.named_modules():
        name = path or "the model"
        hooks = [hook for kind in HOOKS for hook in (getattr(module, kind, None) or {}).values()]
        if any(hook not in OWN_HOOKS for hook in hooks):
            return f"{name} has hooks"
        forward = vars(module).get("forward")
        if forward is not None and not getattr(forward, "is_compiled_step", False):
            return f"{name} has a forward of its own"
    return None


def _tensors(model: Any, family: str) -> str | None:
    for name, tensor in _all(model):
        if tensor.device.type != "cpu":
            return f"{name} is on {tensor.device}, not in CPU memory"
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}"
        if type(tensor) not in (torch.Tensor, nn.Parameter):
            return f"{name} is a {type(tensor).__name__}"
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and not module.weight.is_contiguous():
            return f"{path}.weight is not contiguous"
        scale = module.sketch_scale.dtype if isinstance(module, ShapedLinear) else torch.float16
        if scale is not torch.float16:
            return f"{path}.sketch_scale is {scale}, not float16"
    return None


def _all(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _settings(model: Any, family: str) -> str | None:
    config, base = model.config, model.model
    attention = config._attn_implementation
    if attention not in ATTENTIONS:
        return f"attention is {attention!r}"
    rotation = base.rotary_emb.rope_type
    if rotation not in ROTATIONS:
        return f"rotary embeddings are {rotation!r}"
    dim = base.layers[0].self_attn.head_dim if len(base.layers) else 0
    if dim < 2 or dim % 2 or 2 * base.rotary_emb.inv_freq.numel() != dim:
        return f"rotary embeddings do not cover heads of {dim}"
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if sliding or (family == "Mistral" and config.sliding_window is not None):
        return "attention has a sliding window"
    embedding = base.embed_tokens
    if getattr(embedding, "max_norm", None) is not None:
        return "embeddings have a max_norm"
    if getattr(embedding, "scale", None) is not None:
        return "embeddings are scaled"
    return None
