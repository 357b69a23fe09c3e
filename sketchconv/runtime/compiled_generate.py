"""`model.generate` of a loaded sketch: the compiled step wherever it gives what was asked for.

transformers allows a model a `generate` of its own (an attribute of the instance, as it sets one
for models that ship `custom_generate`). Ours opens a `Decoder` around transformers' `generate` and
hands it the cache; whatever the compiled step does not know goes to transformers untouched.
`type(model).generate(model, ...)` is transformers' own in any case.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["install", "why_not_call"]

ROOM = 256  # positions beyond the prompt to begin with; the cache grows where that is not enough
# Arguments with which `generate` runs something else than one sequence, token by token.
OTHERS = (
    "adapter_names",
    "past_key_values",
    "inputs_embeds",
    "assistant_model",
    "custom_generate",
    "prompt_lookup_num_tokens",
    "cache_implementation",
    "negative_prompt_ids",
    "synced_gpus",
    "output_attentions",
    "output_hidden_states",
)
SINGLE = ("num_beams", "num_return_sequences", "num_beam_groups")


def install(model: Any) -> None:
    """Give `model` a `generate` that decodes with the compiled step where that is possible.

    Models whose class never can (see `why_not`) are left alone; for others each call decides.
    """
    from sketchconv.runtime.decoder_support import FAMILIES

    if type(model).__module__ in FAMILIES and model.can_generate():
        model.generate = MethodType(generate, model)


def generate(model: Any, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    """As `PreTrainedModel.generate`; single sequences on the CPU are decoded by `Decoder`."""
    from sketchconv.runtime.decoder import Decoder

    original = functools.partial(type(model).generate, model)
    if args or why_not_call(model, inputs, kwargs) is not None:
        return original(inputs, *args, **kwargs)
    prompt = _prompt(inputs, kwargs)
    with Decoder(model) as decoder:
        cache = decoder.cache((0 if prompt is None else prompt.shape[1]) + ROOM)
        return original(inputs, **kwargs, past_key_values=cache)


def why_not_call(
    model: PreTrainedModel, inputs: torch.Tensor | None, kwargs: Mapping[str, Any]
) -> str | None:
    """Why this call of `generate` goes through the modules; None where it need not.

    Args:
        model: what generates.
        inputs: the first argument of `generate`.
        kwargs: its keyword arguments.
    """
    from sketchconv.runtime.decoder import why_not_generate

    for name in OTHERS:
        if _asked(model, name, kwargs):
            return f"{name} was asked for"
    if any((_asked(model, name, kwargs) or 1) != 1 for name in SINGLE):
        return "there are several sequences"
    if _asked(model, "use_cache", kwargs) is False:
        return "use_cache is False"
    prompt = _prompt(inputs, kwargs)
    if prompt is not None and (prompt.dim() != 2 or prompt.shape[0] != 1):
        return f"the prompt has the shape {tuple(prompt.shape)}, not [1, length]"
    return why_not_generate(model)


def _prompt(inputs: torch.Tensor | None, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    found = kwargs.get("input_ids") if inputs is None else inputs
    return found if isinstance(found, torch.Tensor) else None


def _asked(model: Any, name: str, kwargs: Mapping[str, Any]) -> Any:
    """What a call says of `name`: its own argument, else the config given, else the model's."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    given = getattr(kwargs.get("generation_config"), name, None)
    return getattr(model.generation_config, name, None) if given is None else given
