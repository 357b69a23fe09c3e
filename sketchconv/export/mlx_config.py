"""A model's config as mlx-lm reads it; what mlx-lm would compute differently is refused.

Read in mlx-lm 0.32.2 (`mlx_lm/models`). Its model classes take settings by name and have defaults
of their own for what is missing; several do not know `rope_parameters`, where transformers 5 keeps
the rotary settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from sketchconv.errors import ArchitectureError

_SILU: Final = ("silu", "swish")
_SCALINGS: Final = ("default", "linear", "llama3", "yarn")
_SIZES: Final = (
    *("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "max_position_embeddings", "rms_norm_eps"),
)


@dataclass
class _Build:
    """Settings of one model while they are collected."""

    config: Any
    values: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def take(self, *names: str) -> None:
        for name in names:
            self.values[name] = getattr(self.config, name)

    def require(self, holds: bool, what: str) -> None:
        if not holds:
            raise ArchitectureError(
                f"config: {what}, which mlx-lm's {self.config.model_type} does not compute; the"
                " model would be wrong there, so none is written"
            )

    def rope(self, rope: Mapping[str, Any], kinds: tuple[str, ...] = _SCALINGS) -> None:
        """`rope_theta`, and `rope_scaling` under the names of both generations."""
        kind = rope.get("rope_type", "default")
        self.require(kind in kinds, f"rope_type is {kind!r}")
        for key in ("attention_factor", "mscale", "mscale_all_dim"):
            self.require(kind != "yarn" or rope.get(key) is None, f"yarn with {key}")
        self.require(kind != "yarn" or rope.get("truncate", True), "yarn with truncate = false")
        self.values["rope_theta"] = float(rope["rope_theta"])
        rest = {k: v for k, v in rope.items() if k != "rope_theta" and v is not None}
        self.values["rope_scaling"] = None if kind == "default" else {**rest, "type": kind}

    def window(self, window: int | None) -> None:
        if window and window < self.config.max_position_embeddings:
            self.notes.append(
                f"the model attends to its last {window} tokens, mlx-lm's {self.config.model_type}"
                " to all of them: longer texts differ"
            )


def mlx_config(
    raw: Mapping[str, Any], config: Any, *, tied: bool
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The config for mlx-lm, and hints for the user.

    Args:
        raw: the model's `config.json`; what mlx-lm does not read stays as it is.
        config: transformers' config of the model, with its defaults filled in.
        tied: whether the head is the embedding, and so not stored.

    Raises:
        ArchitectureError: a model type that is not known to give the same results, or a setting.
    """
    kind = config.model_type
    if kind not in _BUILDERS:
        raise ArchitectureError(
            f"config: an MLX model of type {kind!r} cannot be written; supported are"
            f" {', '.join(_BUILDERS)}. With --dense OUT becomes a plain Hugging Face folder"
        )
    build = _Build(config)
    try:
        build.take(*_SIZES)
        build.values["tie_word_embeddings"] = tied
        _BUILDERS[kind](build)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ArchitectureError(f"config: not one of {kind} ({reason})") from None
    return {**raw, **build.values}, tuple(build.notes)


def _decoder(build: _Build, activations: tuple[str, ...] = _SILU) -> int:
    """What all of them share; returns the size of a head."""
    config = build.config
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    build.require(activation in activations, f"the activation is {activation!r}")
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def _llama(build: _Build) -> None:
    build.values["head_dim"] = _decoder(build)
    for name in ("attention_bias", "mlp_bias"):
        build.values[name] = bool(getattr(build.config, name, False))
    build.rope(build.config.rope_parameters)
    build.window(getattr(build.config, "sliding_window", None))


def _even_heads(build: _Build, head: int) -> None:
    config = build.config
    even = head == config.hidden_size // config.num_attention_heads
    build.require(even, f"head_dim is {head}, not hidden_size over the number of heads")


def _qwen2(build: _Build) -> None:
    _even_heads(build, _decoder(build))
    build.rope(build.config.rope_parameters)
    build.window(_qwen_window(build.config))


def _qwen3(build: _Build) -> None:
    build.values["head_dim"] = _decoder(build)
    build.require(not build.config.attention_bias, "attention has biases")
    build.rope(build.config.rope_parameters)
    build.window(_qwen_window(build.config))


def _qwen_window(config: Any) -> int | None:
    window: int | None = config.sliding_window if config.use_sliding_window else None
    return window


def _phi3(build: _Build) -> None:
    config = build.config
    _even_heads(build, _decoder(build))
    rope = dict(config.rope_parameters)
    # Its scaled positions: mlx-lm takes the long factors at every length.
    build.rope(rope, ("default",))
    build.values["partial_rotary_factor"] = float(rope.get("partial_rotary_factor") or 1.0)
    build.window(config.sliding_window)


def _gemma(build: _Build) -> None:
    build.values["head_dim"] = _decoder(build, ("gelu_pytorch_tanh",))
    build.require(build.values["tie_word_embeddings"], "the head is not the embedding")
    build.require(not build.config.attention_bias, "attention has biases")
    build.take("query_pre_attn_scalar")


def _gemma2(build: _Build) -> None:
    _gemma(build)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        build.require(bool(getattr(build.config, name)), f"{name} is off")
        build.take(name)
    build.rope(build.config.rope_parameters, ("default",))
    build.window(build.config.sliding_window)


def _gemma3(build: _Build) -> None:
    _gemma(build)
    config = build.config
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        build.require(not getattr(config, name), f"{name} is on")
    build.require(not config.use_bidirectional_attention, "attention looks ahead")
    rope = config.rope_parameters
    build.rope(rope["full_attention"], ("default", "linear"))
    local = rope["sliding_attention"]
    build.require(local.get("rope_type", "default") == "default", "local layers scale positions")
    build.values["rope_local_base_freq"] = float(local["rope_theta"])
    build.take("sliding_window")
    types = list(config.layer_types)
    build.require("full_attention" in types, "no layer attends to everything")
    period = types.index("full_attention") + 1
    expected = ["full_attention" if (i + 1) % period == 0 else "sliding_attention"
                for i in range(len(types))]  # fmt: skip
    build.require(types == expected, "layer_types is not one whole layer after as many local ones")
    build.values["sliding_window_pattern"] = period


_BUILDERS: Final[Mapping[str, Callable[[_Build], None]]] = MappingProxyType(
    {
        "llama": _llama,
        "mistral": _llama,
        "qwen2": _qwen2,
        "qwen3": _qwen3,
        "gemma2": _gemma2,
        "gemma3_text": _gemma3,
        "phi3": _phi3,
    }
)
