"""A model's hyper-parameters as GGUF keys; what llama.cpp would compute differently is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from sketchconv.errors import ArchitectureError
from sketchconv.export.architectures import ExportArchitecture
from sketchconv.export.rope import RopeTensors, longrope, plain_rope
from sketchconv.formats import gguf_values as v
from sketchconv.sources.gguf_config import PERIODS, WIDE_LAYERS

_SILU: Final = ("silu", "swish")


@dataclass(frozen=True)
class Hyperparameters:
    """Keys with encoded values, tensors of rotary frequencies by name, hints for the user."""

    values: Mapping[str, bytes]
    tensors: RopeTensors
    notes: tuple[str, ...]


@dataclass
class _Build:
    """Keys of one architecture while they are collected."""

    name: str
    config: Any
    values: dict[str, bytes] = field(default_factory=dict)
    tensors: dict[str, tuple[float, ...]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def put(self, key: str, value: bytes) -> None:
        self.values[f"{self.name}.{key}"] = value

    def sizes(self, **sizes: int) -> None:
        for key, value in sizes.items():
            self.put(key.replace("__", "."), v.uint32(int(value)))

    def number(self, key: str, value: float) -> None:
        self.put(key, v.float32(float(value)))

    def require(self, holds: bool, what: str) -> None:
        if not holds:
            raise ArchitectureError(
                f"config: {what}, which llama.cpp's {self.name} does not compute; a GGUF file of"
                " this model would be wrong, so none is written"
            )

    def rope(self, parts: tuple[Mapping[str, bytes], RopeTensors]) -> None:
        frequencies = "rope_freqs.weight" in parts[1]
        self.require(self.name == "llama" or not frequencies, "rope_type is 'llama3'")
        for key, value in parts[0].items():
            self.put(key, value)
        self.tensors.update(parts[1])


def hyperparameters(architecture: ExportArchitecture, config: Any) -> Hyperparameters:
    """The keys of an architecture from transformers' config object.

    Args:
        architecture: one of `ARCHITECTURES`.
        config: transformers' config of the model, with its defaults filled in.

    Raises:
        ArchitectureError: a setting that llama.cpp's model has no equivalent for.
    """
    build = _Build(architecture.name, config)
    try:
        _BUILDERS[architecture.name](build)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ArchitectureError(f"config: not one of {architecture.name} ({reason})") from None
    return Hyperparameters(
        MappingProxyType(build.values), MappingProxyType(build.tensors), tuple(build.notes)
    )


def _base(build: _Build, activations: Iterable[str] = _SILU) -> int:
    """What all decoders with RMSNorm share; returns the size of a head."""
    config = build.config
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    build.require(activation in activations, f"the activation is {activation!r}")
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    build.sizes(
        block_count=config.num_hidden_layers,
        context_length=config.max_position_embeddings,
        embedding_length=config.hidden_size,
        feed_forward_length=config.intermediate_size,
        attention__head_count=heads,
        attention__head_count_kv=config.num_key_value_heads,
        attention__key_length=head_dim,
        attention__value_length=head_dim,
        vocab_size=config.vocab_size,
    )
    build.number("attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    return int(head_dim)


def _llama(build: _Build) -> None:
    head_dim = _base(build)
    build.sizes(rope__dimension_count=head_dim)
    build.rope(plain_rope(build.config.rope_parameters, head_dim))
    _window_note(build)


def _qwen(build: _Build) -> None:
    head_dim = _base(build)
    build.rope(plain_rope(build.config.rope_parameters, head_dim))
    if getattr(build.config, "use_sliding_window", False):
        _window_note(build)


def _window_note(build: _Build) -> None:
    window = getattr(build.config, "sliding_window", None)
    if window and window < build.config.max_position_embeddings:
        build.notes.append(
            f"the model attends to its last {window} tokens, llama.cpp's {build.name} to all of"
            f" them: longer texts differ"
        )


def _phi3(build: _Build) -> None:
    config = build.config
    head_dim = _base(build)
    rope = dict(config.rope_parameters)
    rotary = int(head_dim * (rope.get("partial_rotary_factor") or 1.0))
    original = rope.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", config.max_position_embeddings
    )
    build.sizes(
        rope__dimension_count=rotary,
        rope__scaling__original_context_length=original,
        # Without one, zero: it tells llama.cpp that this model has no window.
        attention__sliding_window=config.sliding_window or 0,
    )
    if rope.get("rope_type") in ("longrope", "su"):
        build.rope(longrope(rope, rotary, config.max_position_embeddings, original))
    else:
        build.rope(plain_rope(rope, rotary))
    _window_note(build)


def _gemma(build: _Build) -> None:
    config, period = build.config, PERIODS[build.name]
    head_dim = _base(build, ("gelu_pytorch_tanh",))
    wide = config.num_hidden_layers == WIDE_LAYERS[build.name]
    scale = config.hidden_size // config.num_attention_heads if wide else head_dim
    build.require(
        config.query_pre_attn_scalar == scale,
        f"query_pre_attn_scalar is {config.query_pre_attn_scalar} rather than {scale}",
    )
    expected = [
        "sliding_attention" if (i + 1) % period else "full_attention"
        for i in range(config.num_hidden_layers)
    ]
    build.require(
        list(config.layer_types) == expected,
        f"layer_types is not: all layers but every {period}th attend to a window",
    )
    build.sizes(attention__sliding_window=config.sliding_window)


def _gemma2(build: _Build) -> None:
    config = build.config
    _gemma(build)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        build.require(bool(getattr(config, key)), f"{key} is off")
        build.number(key, getattr(config, key))
    build.rope(plain_rope(config.rope_parameters, config.head_dim))


def _gemma3(build: _Build) -> None:
    config = build.config
    _gemma(build)
    build.require(not config.attn_logit_softcapping, "attn_logit_softcapping is on")
    build.require(not config.use_bidirectional_attention, "attention looks ahead")
    if config.final_logit_softcapping:
        build.number("final_logit_softcapping", config.final_logit_softcapping)
    rope = config.rope_parameters
    build.rope(plain_rope(rope["full_attention"], config.head_dim))
    local = rope["sliding_attention"]
    build.require(local.get("rope_type", "default") == "default", "local layers scale positions")
    build.number("rope.freq_base_swa", local["rope_theta"])


def _gpt2(build: _Build) -> None:
    config = build.config
    activation = config.activation_function
    build.require(activation in ("gelu_new", "gelu_pytorch_tanh"), f"it has {activation!r}")
    build.require(bool(config.scale_attn_weights), "scale_attn_weights is off")
    scaled = bool(config.scale_attn_by_inverse_layer_idx)
    build.require(not scaled, "attention is scaled by the layer's number")
    build.sizes(
        block_count=config.n_layer,
        context_length=config.n_positions,
        embedding_length=config.n_embd,
        feed_forward_length=config.n_inner or 4 * config.n_embd,
        attention__head_count=config.n_head,
        vocab_size=config.vocab_size,
    )
    build.number("attention.layer_norm_epsilon", config.layer_norm_epsilon)


_BUILDERS: Final[Mapping[str, Callable[[_Build], None]]] = {
    "llama": _llama,
    "qwen2": _qwen,
    "qwen3": _qwen,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "gpt2": _gpt2,
}
