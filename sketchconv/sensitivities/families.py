"""Families of networks by how their blocks compute: which module plays which role, in order.

Names alone are not enough (Gemma's gain is 1 + w where Llama's is w, Granite scales its residual
sums), so a family is found by the model type, and its modules by their names.
"""

from __future__ import annotations

from dataclasses import dataclass

# Roles that only read what the last norm gave, and change nothing that comes after them.
READERS = frozenset({"q", "k", "head", "pooler"})
# Norms: of the residual stream for the modules behind it; of what a block adds to the stream; of
# the stream itself.
PRE_NORMS = frozenset({"norm_1", "norm_2", "norm"})
ADDED_NORMS = frozenset({"added_1", "added_2"})
STREAM_NORMS = frozenset({"stream_0", "stream_1", "stream_2"})
NORMS = PRE_NORMS | ADDED_NORMS | STREAM_NORMS
EMBEDDINGS = frozenset({"embedding", "position", "token_type"})
# Modules that write into the residual stream, and those before the activation.
WRITERS = frozenset({"o", "down"})
HIDDEN = frozenset({"gate", "up", "gate_up"})
VALUES = frozenset({"v", "qkv"})

Modules = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Family:
    """Model types that compute alike.

    Attributes:
        model_types: as in `config.json`.
        stack: what the list of blocks is called.
        first: modules in front of the blocks and their roles, in the order in which they act.
        block: those of a block.
        last: those behind the blocks; none is required.
        sides: modules of a block that change no second moment of any linear module's input.
        activation: keys of the config that name it, the first that is set decides.
        epsilon: key of the norms' epsilon.
        heads: key of the number of query heads.
        layer_norm: norms subtract the mean over channels (LayerNorm) instead of none (RMSNorm).
        gain_offset: what is added to a norm's weight to have its gain.
        scaled_embedding: embeddings are multiplied by the root of the width.
        transposed: linear weights are stored ``[in, out]``.
    """

    model_types: frozenset[str]
    stack: str
    first: Modules
    block: Modules
    last: Modules
    sides: tuple[str, ...] = ()
    activation: tuple[str, ...] = ("hidden_act",)
    epsilon: str = "rms_norm_eps"
    heads: str = "num_attention_heads"
    layer_norm: bool = False
    gain_offset: float = 0.0
    scaled_embedding: bool = False
    transposed: bool = False

    @property
    def roles(self) -> frozenset[str]:
        """All roles of a block."""
        return frozenset(role for _, role in self.block)


_QKVO: Modules = tuple((f"self_attn.{n}_proj", n) for n in "qkvo")
_GATED: Modules = tuple((f"mlp.{name}_proj", name) for name in ("gate", "up", "down"))
_LLAMA_FIRST: Modules = (("embed_tokens", "embedding"),)
_LLAMA_LAST: Modules = (("norm", "norm"), ("lm_head", "head"))
_SIDES = ("self_attn.q_norm", "self_attn.k_norm", "self_attn.rotary_emb")
_LLAMA_BLOCK: Modules = (
    ("input_layernorm", "norm_1"),
    *_QKVO,
    ("post_attention_layernorm", "norm_2"),
    *_GATED,
)
_GEMMA_ACTIVATION = ("hidden_activation", "hidden_act")

FAMILIES = (
    Family(
        frozenset({"llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3"}),
        *("layers", _LLAMA_FIRST, _LLAMA_BLOCK, _LLAMA_LAST, _SIDES),
    ),
    Family(
        frozenset({"gemma"}),
        *("layers", _LLAMA_FIRST, _LLAMA_BLOCK, _LLAMA_LAST, _SIDES),
        activation=_GEMMA_ACTIVATION,
        gain_offset=1.0,
        scaled_embedding=True,
    ),
    Family(
        frozenset({"gemma2", "gemma3_text"}),
        "layers",
        _LLAMA_FIRST,
        (
            ("input_layernorm", "norm_1"),
            *_QKVO,
            ("post_attention_layernorm", "added_1"),
            ("pre_feedforward_layernorm", "norm_2"),
            *_GATED,
            ("post_feedforward_layernorm", "added_2"),
        ),
        _LLAMA_LAST,
        _SIDES,
        activation=_GEMMA_ACTIVATION,
        gain_offset=1.0,
        scaled_embedding=True,
    ),
    Family(
        frozenset({"phi3"}),
        "layers",
        _LLAMA_FIRST,
        (
            ("input_layernorm", "norm_1"),
            ("self_attn.qkv_proj", "qkv"),
            ("self_attn.o_proj", "o"),
            ("post_attention_layernorm", "norm_2"),
            ("mlp.gate_up_proj", "gate_up"),
            ("mlp.down_proj", "down"),
        ),
        _LLAMA_LAST,
        _SIDES,
    ),
    Family(
        frozenset({"gpt2"}),
        "h",
        (("wte", "embedding"), ("wpe", "position")),
        (
            ("ln_1", "norm_1"),
            ("attn.c_attn", "qkv"),
            ("attn.c_proj", "o"),
            ("ln_2", "norm_2"),
            ("mlp.c_fc", "up"),
            ("mlp.c_proj", "down"),
        ),
        (("ln_f", "norm"), ("lm_head", "head")),
        ("attn",),  # its mask was stored as a buffer once
        activation=("activation_function",),
        epsilon="layer_norm_epsilon",
        heads="n_head",
        layer_norm=True,
        transposed=True,
    ),
    Family(
        frozenset({"bert", "roberta", "xlm-roberta", "camembert"}),
        "encoder.layer",
        (
            ("embeddings.word_embeddings", "embedding"),
            ("embeddings.position_embeddings", "position"),
            ("embeddings.token_type_embeddings", "token_type"),
            ("embeddings.LayerNorm", "stream_0"),
        ),
        (
            ("attention.self.query", "q"),
            ("attention.self.key", "k"),
            ("attention.self.value", "v"),
            ("attention.output.dense", "o"),
            ("attention.output.LayerNorm", "stream_1"),
            ("intermediate.dense", "up"),
            ("output.dense", "down"),
            ("output.LayerNorm", "stream_2"),
        ),
        (("pooler.dense", "pooler"),),
        epsilon="layer_norm_eps",
        layer_norm=True,
    ),
)
