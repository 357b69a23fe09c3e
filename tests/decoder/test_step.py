"""The compiled step against transformers, for every kind of model that it supports.

The measure is a float64 twin: what the step loses to rounding must be no more than a small multiple
of what transformers itself loses in the model's dtype.
"""

from __future__ import annotations

import pytest
import torch

from sketchconv.formats.grids import GRIDS
from sketchconv.kernels import dispatch
from sketchconv.runtime.decoder import Decoder, why_not
from sketchconv.runtime.shaped import ShapedLinear

TOKENS = torch.randint(3, 140, (1, 40), generator=torch.Generator().manual_seed(5))
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SHAPED_FORMS = [(grid, bits) for grid, known in GRIDS.items() for bits in known.bits]
SHAPED = {"hidden_size": 96, "intermediate_size": 160, "shapes": {"": ("iq4_nl", 4, 32)}}
FREE_AND_SHAPED = {
    "q_proj": ("iq4_nl", 4, 64),
    "v_proj": ("affine", 5, 32),
    "up_proj": ("symmetric", 8, 32),
    "down_proj": ("affine", 4, 96),
    "lm_head": ("symmetric", 5, 64),
}
KINDS = {
    "llama": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 20}),
    "one head each": ("LlamaForCausalLM", {"num_key_value_heads": 4}),
    "one key head": ("LlamaForCausalLM", {"num_key_value_heads": 1}),
    "wide heads": ("LlamaForCausalLM", {"head_dim": 24}),
    "narrow heads": ("Qwen3ForCausalLM", {"head_dim": 6, "num_attention_heads": 6}),
    "odd sizes": ("LlamaForCausalLM", {"hidden_size": 40, "intermediate_size": 70}),
    "tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "tied sketch": ("LlamaForCausalLM", {"tie_word_embeddings": True, "embeddings": True}),
    "sketched ends": ("LlamaForCausalLM", {"embeddings": True, "head": True, "bits": 8}),
    "biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama3 rotation": ("LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "groups": ("LlamaForCausalLM", {"bits": 3, "groups": 4, "lut": torch.float32}),
    "woven": (
        "LlamaForCausalLM",
        {"bits": 3, "hidden_size": 512, "intermediate_size": 600, "embeddings": True, "head": True},
    ),
    "bfloat16 tables": ("LlamaForCausalLM", {"bits": 6, "lut": torch.bfloat16}),
    "mixed bits": (
        "LlamaForCausalLM",
        {"bits": {f"model.layers.0.mlp.{n}_proj": b for n, b in (("up", 2), ("down", 7))}},
    ),
    "shaped": ("LlamaForCausalLM", SHAPED),
    "shaped with biases": ("Qwen2ForCausalLM", SHAPED),
    "free and shaped": ("Qwen3ForCausalLM", {"shapes": FREE_AND_SHAPED, "head": True}),
}


def logits_of_steps(model, tokens, *, threads=1, kernels=None, capacity=256, prefill=0):
    """Logits after each token from number `prefill` on, through the compiled step."""
    with Decoder(model, threads=threads, kernels=kernels) as decoder, torch.no_grad():
        cache = decoder.cache(capacity)
        if prefill:
            model(tokens[:, :prefill], past_key_values=cache)
        out, made = [], []
        step = cache.session.step
        cache.session.step = lambda *args: made.append(args) or step(*args)
        for i in range(prefill, tokens.shape[1]):
            answer = model(tokens[:, i : i + 1], past_key_values=cache)
            assert made == [(int(tokens[0, j]), j) for j in range(prefill, i + 1)]
            assert cache.length == i + 1
            out.append(answer.logits[0, -1])
    return torch.stack(out)


def errors(pair, got, tokens, first=0):
    """Root mean square errors of `got` and of transformers, against float64."""
    with torch.no_grad():
        exact = pair.exact()(tokens).logits[0, first:]
        theirs = pair.model(tokens).logits[0, first:]
    return tuple((x.double() - exact).square().mean().sqrt().item() for x in (got, theirs))


@pytest.mark.parametrize("name", KINDS)
def test_float32_is_as_exact_as_transformers(pair, name):
    kind, options = KINDS[name]
    made = pair(kind, **options)
    assert why_not(made.model) is None
    ours, theirs = errors(made, logits_of_steps(made.model, TOKENS), TOKENS)
    assert 0 < ours <= 2 * theirs


@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize(("grid", "bits"), SHAPED_FORMS)
def test_every_grid_is_as_exact_as_transformers(pair, grid, bits, width):
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 1}
    made = pair(shapes={"": (grid, bits, width)}, **sizes)
    assert all(isinstance(m, ShapedLinear) for m in linears(made.model))
    tokens = TOKENS[:, :20]
    ours, theirs = errors(made, logits_of_steps(made.model, tokens), tokens)
    assert 0 < ours <= 2 * theirs


def linears(model):
    return [m for path, m in model.named_modules() if path.endswith("_proj")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
@pytest.mark.parametrize("options", [{}, {"shapes": {"": ("affine", 4, 32)}}], ids=["free", "grid"])
def test_short_dtypes_lose_less_than_in_transformers(pair, kind, dtype, options):
    made = pair(kind, dtype=dtype, **options)
    got = logits_of_steps(made.model, TOKENS, prefill=7)
    assert got.dtype is torch.float32
    ours, theirs = errors(made, got, TOKENS, 7)
    assert 0 < ours < theirs


def test_a_dense_model_without_any_sketch(makers):
    model = makers.build("Qwen3ForCausalLM")
    with torch.no_grad():
        expected = model(TOKENS).logits[0]
        exact = makers.build("Qwen3ForCausalLM").double()(TOKENS).logits[0]
    got = logits_of_steps(model, TOKENS, threads=2)
    assert (got - exact).square().mean() <= 4 * (expected - exact).square().mean()


@pytest.mark.parametrize("prefill", [1, 15, 16, 17, 33])
def test_a_prompt_through_the_modules_then_steps(pair, prefill):
    made = pair("Qwen3ForCausalLM")
    got = logits_of_steps(made.model, TOKENS, prefill=prefill)
    ours, theirs = errors(made, got, TOKENS, prefill)
    assert 0 < ours <= 2 * theirs


def test_memory_grows_beyond_its_capacity(pair):
    made = pair()
    short = logits_of_steps(made.model, TOKENS, capacity=1)
    assert torch.equal(short, logits_of_steps(made.model, TOKENS, capacity=64))


GRID = {"shapes": {"_proj": ("affine", 5, 32)}}


@pytest.mark.parametrize("kernels", ["avx512", "avx512-avx512vbmi", "avx2", "portable"])
@pytest.mark.parametrize(
    "options", [{"bits": 3}, {"bits": 4, "groups": 2}, {"bits": 8}, GRID], ids=str
)
def test_forced_kernels(pair, kernels, options):
    try:
        dispatch.choose(kernels)
    except ValueError as error:
        pytest.skip(str(error))
    made = pair(embeddings=True, **options)
    ours, theirs = errors(made, logits_of_steps(made.model, TOKENS, kernels=kernels), TOKENS)
    assert 0 < ours <= 2 * theirs


def test_infinite_weights_reach_the_logits(pair):
    made = pair()
    with torch.no_grad():
        made.model.model.layers[0].self_attn.v_proj.sketch_lut[3] = float("inf")
    got = logits_of_steps(made.model, TOKENS[:, :3])
    assert not got.isfinite().any()


def test_infinite_scales_reach_the_logits(pair):
    made = pair(**SHAPED)
    with torch.no_grad():
        made.model.model.layers[0].self_attn.v_proj.sketch_scale[3] = float("inf")
    assert not logits_of_steps(made.model, TOKENS[:, :3]).isfinite().any()
