"""Roles of a checkpoint's tensors, from tiny models that transformers saved."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sketchconv.architecture import map_model
from sketchconv.errors import ArchitectureError, SourceError
from sketchconv.formats.tensors import TensorInfo
from sketchconv.sources.checkpoint import CheckpointSource

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXT = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def save(folder, model):
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def mapped(folder, **changes):
    with CheckpointSource(folder) as source:
        return map_model({**source.config(), **changes}, source.infos)


def rename(folder, change):
    """Rewrite the weights with other names; None drops a tensor."""
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save_torch

    tensors = {change(name): value for name, value in load(folder / "model.safetensors").items()}
    tensors.pop(None, None)
    save_torch(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Saves a tiny model of a kind once, and gives a copy of its folder."""
    import shutil

    made = {}

    def get(kind, tmp_path):
        if kind not in made:
            torch.manual_seed(0)
            made[kind] = save(tmp_path_factory.mktemp(kind), BUILD[kind]())
        return shutil.copytree(made[kind], tmp_path / kind)

    return get


def llama(**changes):
    config = transformers.LlamaConfig(**{**TEXT, **changes})
    return transformers.LlamaForCausalLM(config)


def bert():
    config = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
    return transformers.BertModel(transformers.BertConfig(**config))


BUILD = {
    "llama": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "bert": bert,
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**TEXT, num_local_experts=3)
    ),
    "classifier": lambda: transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**TEXT, num_labels=3)
    ),
}


def in_layers(*modules):
    return {f"model.layers.{i}.{module}.weight" for i in range(2) for module in modules}


ATTENTION = [f"self_attn.{x}_proj" for x in "qkvo"]
MLP = [f"mlp.{x}_proj" for x in ("gate", "up", "down")]


def test_causal_language_model(saved, tmp_path):
    model = mapped(saved("llama", tmp_path))
    assert set(model.linears) == in_layers(*ATTENTION, *MLP)
    assert model.heads == ("lm_head.weight",)
    assert model.embeddings == ("model.embed_tokens.weight",)
    assert model.aliases == model.ties == model.unsupported == {}
    assert model.extra == model.transposed == ()
    assert model.parameters["model.layers.1.mlp.down_proj.weight"] == (32, 48)
    assert len(model.parameters) == 2 * 9 + 3
    assert all(name == target for name, target in model.modules.items())


def test_tied_head_is_an_alias(saved, tmp_path):
    model = mapped(saved("tied", tmp_path))
    assert model.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert model.ties == {}
    assert model.heads == ()


def test_tied_weights_that_are_both_stored(saved, tmp_path):
    model = mapped(saved("llama", tmp_path), tie_word_embeddings=True)
    assert model.aliases == {}
    assert model.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    assert model.heads == ("lm_head.weight",)


def test_tied_embedding_of_which_only_the_head_is_stored(saved, tmp_path):
    folder = rename(
        saved("tied", tmp_path),
        lambda name: "lm_head.weight" if name == "model.embed_tokens.weight" else name,
    )
    assert mapped(folder).aliases == {"model.embed_tokens.weight": "lm_head.weight"}


def test_encoder_with_an_old_buffer(saved, tmp_path):
    folder = saved("bert", tmp_path)
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save_torch

    tensors = load(folder / "model.safetensors")
    tensors["embeddings.position_ids"] = torch.arange(64)[None]
    tensors["old.mask"] = torch.ones(2, dtype=torch.bool)
    save_torch(tensors, folder / "model.safetensors")
    model = mapped(folder)
    assert model.extra == ("embeddings.position_ids", "old.mask")
    assert "pooler.dense.weight" in model.linears
    assert len(model.linears) == 2 * 6 + 1
    assert len(model.embeddings) == 3
    assert model.heads == ()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_base_prefix_may_be_missing(saved, tmp_path, kind):
    folder = saved(kind, tmp_path)
    prefix = {"llama": "model.", "gpt2": "transformer."}[kind]
    before = mapped(folder)
    after = mapped(rename(folder, lambda name: name.removeprefix(prefix)))
    assert {name.removeprefix(prefix) for name in before.linears} == set(after.linears)
    assert {prefix + name for name in after.linears} == {after.modules[n] for n in after.linears}


def test_base_prefix_may_be_too_much(saved, tmp_path):
    folder = rename(saved("bert", tmp_path), lambda name: f"bert.{name}")
    model = mapped(folder)
    assert "bert.encoder.layer.0.attention.self.query.weight" in model.linears
    assert model.modules["bert.pooler.dense.weight"] == "pooler.dense.weight"


def test_old_names_of_layer_norms(saved, tmp_path):
    def old(name):
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        )

    model = mapped(rename(saved("bert", tmp_path), old))
    assert model.modules["embeddings.LayerNorm.gamma"] == "embeddings.LayerNorm.weight"
    assert model.extra == ()


def test_transposed_linears(saved, tmp_path):
    model = mapped(saved("gpt2", tmp_path))
    assert set(model.transposed) == set(model.linears)
    assert "transformer.h.0.attn.c_attn.weight" in model.transposed
    assert set(model.embeddings) == {"transformer.wte.weight", "transformer.wpe.weight"}


def test_each_matrix_of_an_expert_is_a_linear_weight(saved, tmp_path):
    folder = saved("mixtral", tmp_path)
    model = mapped(folder)
    assert not model.unsupported
    assert set(model.linears) - set(model.experts) == in_layers(*ATTENTION)
    assert len(model.experts) == 2 * 3 * 3
    first = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    assert model.experts[first] == "model.layers.1.mlp.experts"
    assert model.modules[first] == "model.layers.1.mlp.experts.2.w3.weight"
    everything = {*model.parameters, *model.unsupported, *model.extra}
    with CheckpointSource(folder) as source:
        assert everything == set(source.infos)


def test_task_heads_are_heads(saved, tmp_path):
    model = mapped(saved("classifier", tmp_path))
    assert model.heads == ("score.weight",)
    assert set(model.linears) == in_layers(*ATTENTION, *MLP)


@pytest.mark.parametrize("architectures", [None, [], ["NoSuchClass"], "LlamaForCausalLM"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_class_by_model_type_if_the_config_names_none(saved, tmp_path, architectures, kind):
    if kind == "bert" and architectures == "LlamaForCausalLM":
        architectures = "BertModel"
    folder = saved(kind, tmp_path)
    assert mapped(folder, architectures=architectures) == mapped(folder)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "unheard-of"}, "'unheard-of' is unknown to transformers 5"),
        ({"model_type": None}, "no model_type"),
        ({"num_hidden_layers": 3}, r"needs 9 tensors .* model.layers.2"),
        ({"num_hidden_layers": 1}, r"model.layers.1.* has no such layer \(9 such tensors\)"),
        ({"vocab_size": 41}, r"weight: .*\[40, 32\].*\[41, 32\]"),
        ({"intermediate_size": 64}, "do not belong together"),
        ({"hidden_size": 10**18}, "hidden_size is 1000000000000000000"),
        ({"hidden_size": 1e18}, "hidden_size is 1e"),
        ({"hidden_size": float("nan")}, "hidden_size is nan"),
        ({"num_hidden_layers": 10**9}, "only 21 tensors"),
        ({"vocab_size": 10**15}, "vocab_size is"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings is"),
        ({"num_attention_heads": 0}, "cannot be built"),
        ({"num_attention_heads": -1}, "cannot be built|do not belong"),
        ({"hidden_size": "wide"}, "cannot be built"),
        ({"hidden_act": "unheard-of"}, "cannot be built"),
        ({"rope_parameters": 3}, "cannot be built"),
    ],
)
def test_configs_that_do_not_fit(saved, tmp_path, changes, match):
    with pytest.raises(ArchitectureError, match=match) as caught:
        mapped(saved("llama", tmp_path), **changes)
    assert "\n" not in str(caught.value)


def test_sizes_inside_a_part_of_the_config(saved, tmp_path):
    with pytest.raises(ArchitectureError, match="hidden_size"):
        mapped(saved("llama", tmp_path), text_config={"hidden_size": 10**18})


def test_missing_tensor_is_named(saved, tmp_path):
    name = "model.layers.1.self_attn.v_proj.weight"
    folder = rename(saved("llama", tmp_path), lambda n: None if n == name else n)
    with pytest.raises(ArchitectureError, match=f"needs 1 tensors .*: {name};"):
        mapped(folder)


def test_one_weight_under_two_names(saved, tmp_path):
    folder = saved("bert", tmp_path)
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save_torch

    tensors = load(folder / "model.safetensors")
    tensors["bert.pooler.dense.weight"] = tensors["pooler.dense.weight"].clone()
    save_torch(tensors, folder / "model.safetensors")
    with pytest.raises(ArchitectureError, match="are the same weight"):
        mapped(folder)


def test_quantized_config_is_refused_here_too():
    config = {"model_type": "llama", "quantization_config": {"quant_method": "awq"}}
    with pytest.raises(SourceError, match="awq"):
        map_model(config, {})


def test_code_in_the_checkpoint_is_never_run(saved, tmp_path):
    folder = saved("llama", tmp_path)
    (folder / "modeling_evil.py").write_text("raise SystemExit('ran')\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    assert mapped(folder).heads == ("lm_head.weight",)
    with CheckpointSource(folder) as source:
        assert "modeling_evil.py" not in source.files()


def test_no_weights_are_allocated():
    """A 70-billion-parameter model is mapped from shapes alone."""
    size = {"vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672}
    config = {**TEXT, **size, "num_hidden_layers": 80, "num_attention_heads": 64,
              "num_key_value_heads": 8, "model_type": "llama"}  # fmt: skip
    shapes = {"q": (8192, 8192), "k": (1024, 8192), "v": (1024, 8192), "o": (8192, 8192)}
    infos = {
        "model.embed_tokens.weight": (128256, 8192),
        "lm_head.weight": (128256, 8192),
        "model.norm.weight": (8192,),
    }
    for i in range(80):
        root = f"model.layers.{i}"
        infos.update({f"{root}.self_attn.{x}_proj.weight": shape for x, shape in shapes.items()})
        infos.update({f"{root}.mlp.{x}_proj.weight": (28672, 8192) for x in ("gate", "up")})
        infos[f"{root}.mlp.down_proj.weight"] = (8192, 28672)
        infos[f"{root}.input_layernorm.weight"] = (8192,)
        infos[f"{root}.post_attention_layernorm.weight"] = (8192,)
    model = map_model(config, {n: TensorInfo(n, "BF16", s) for n, s in infos.items()})
    assert len(model.linears) == 560
    assert sum(int(np.prod(shape)) for shape in model.parameters.values()) == 70553706496
