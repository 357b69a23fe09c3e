"""`sketchconv.load`, `load_tokenizer` and `generate.stream`, on bundles and folders."""

from __future__ import annotations

import copy
import json
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import sketchconv
from sketchconv.errors import LoadError
from sketchconv.runtime.generate import stream

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def tokenizer_files(folder, template):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", "user", "system", "assistant"]
    words += [f"w{i}" for i in range(151 - len(words))]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=template,
    )
    fast.save_pretrained(folder)
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def bundle(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    files = tokenizer_files(folder / "tokenizer", TEMPLATE)
    files["generation_config.json"] = json.dumps({"eos_token_id": [2, 9]}).encode()
    model = tiny.build("LlamaForCausalLM", tie_word_embeddings=True)
    return tiny.write(model, folder / "m.sktch", embeddings=True, files=files)


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def test_a_bundle_loads_and_leaves_nothing_behind(bundle, ids, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = sketchconv.load(bundle.path)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert list(tmp_path.iterdir()) == []
    assert model.config.name_or_path == str(bundle.path)
    assert torch.allclose(logits(model, ids), logits(bundle.dense, ids), atol=1e-3)
    assert model.generation_config.eos_token_id == [2, 9]
    assert not any(p.requires_grad for p in model.parameters())


def test_a_loaded_bundle_is_saved_as_a_folder(bundle, ids, tmp_path):
    from sketchconv.formats.validate import validate

    model = sketchconv.load(bundle.path, dtype=torch.float32)
    model.save_pretrained(tmp_path / "folder")
    assert list(validate(tmp_path / "folder")) == []
    again = sketchconv.load(tmp_path / "folder")
    assert torch.equal(logits(model, ids), logits(again, ids))


def test_other_classes_and_options(bundle):
    base = sketchconv.load(bundle.path, "AutoModel", dtype=torch.bfloat16)
    assert type(base).__name__ == "LlamaModel"
    assert base.dtype is torch.bfloat16
    from transformers import AutoModelForCausalLM

    causal = sketchconv.load(str(bundle.path), AutoModelForCausalLM, device_map="cpu")
    assert causal.dtype is torch.float32


def test_without_a_dtype_in_the_config_that_of_the_source_counts(tiny, tmp_path):
    sketch = tiny.write(tiny.build("LlamaForCausalLM"), tmp_path / "m", config={"dtype": None})
    assert sketchconv.load(sketch.path).dtype is torch.float32


def test_failures_are_one_clear_line(tiny, tmp_path, bundle):
    with pytest.raises(LoadError, match="there is no such file"):
        sketchconv.load(tmp_path / "nothing")
    (tmp_path / "text.sktch").write_text("hello, this is not a model at all")
    with pytest.raises(LoadError, match="not a sketch"):
        sketchconv.load(tmp_path / "text.sktch")
    tiny.build("LlamaForCausalLM").save_pretrained(tmp_path / "dense")
    with pytest.raises(LoadError, match="not a sketch"):
        sketchconv.load(tmp_path / "dense")
    with pytest.raises(LoadError, match="no model class AutoModelForNothing"):
        sketchconv.load(bundle.path, "AutoModelForNothing")
    model = tiny.build("LlamaForCausalLM")
    odd = {"architectures": ["Unknown"], "model_type": "unknown-type"}
    strange = tiny.write(model, tmp_path / "odd", config=odd).path
    with pytest.raises(LoadError, match="no model class Unknown"):
        sketchconv.load(strange)
    with pytest.raises(LoadError, match="transformers cannot open it") as caught:
        sketchconv.load(strange, "AutoModel")
    assert "\n" not in str(caught.value)
    future = {"quantization_config": {"quant_method": "sktch", "format": "2.0"}}
    newer = tiny.write(tiny.build("LlamaForCausalLM"), tmp_path / "new", config=future).path
    with pytest.raises(LoadError, match=r"has format 2\.0"):
        sketchconv.load(newer)
    other = {"quantization_config": {"quant_method": "gptq"}}
    foreign = tiny.write(tiny.build("LlamaForCausalLM"), tmp_path / "gptq", config=other).path
    with pytest.raises(LoadError, match="quant_method 'gptq'"):
        sketchconv.load(foreign)
    with pytest.raises(LoadError, match="holds no tokenizer"):
        sketchconv.load_tokenizer(strange)


def test_one_copy_of_the_weights(bundle):
    """Codes are used as they lie on disk: as many bytes in memory as in the file."""
    model = sketchconv.load(bundle.path)
    held = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    from sketchconv.formats.reader import SktchModel

    with SktchModel.open(bundle.path) as file:
        names = [n for n in file.tensors if not n.startswith("sktch.") and n not in bundle.records]
        assert held == sum(file.tensors[n].nbytes for n in names)
    dense = [t for t in model.buffers() if t.numel() >= 64 * 64 and t.is_floating_point()]
    assert not dense


def test_the_tokenizer_comes_out_of_the_bundle(bundle):
    tokenizer = sketchconv.load_tokenizer(bundle.path)
    assert tokenizer("w3 w4").input_ids == [10, 11]
    assert tokenizer.chat_template == TEMPLATE


@pytest.fixture(scope="module")
def talker(bundle):
    return sketchconv.load(bundle.path), sketchconv.load_tokenizer(bundle.path)


def greedy(model, tokenizer, text, count):
    inputs = torch.tensor([tokenizer(text).input_ids])
    out = model.generate(inputs, max_new_tokens=count, do_sample=False, eos_token_id=[2, 9])
    return tokenizer.decode(out[0, inputs.shape[1] :], skip_special_tokens=True)


def test_streams_what_generate_writes(talker):
    model, tokenizer = talker
    pieces = list(stream(model, tokenizer, "w1 w2", max_new_tokens=8, chat=False))
    assert len(pieces) > 1
    assert "".join(pieces) == greedy(model, tokenizer, "w1 w2", 8)


def test_uses_the_chat_template(talker):
    model, tokenizer = talker
    text = "".join(stream(model, tokenizer, "w1", max_new_tokens=6, system="w5"))
    assert text == greedy(model, tokenizer, "system w5 user w1 assistant", 6)


def test_stops_at_every_end_token(talker):
    model, tokenizer = talker
    tokens = greedy(model, tokenizer, "w1 w2", 8).split()
    third = tokenizer.convert_tokens_to_ids(tokens[2])
    first = tokens.index(tokens[2])
    twin = copy.deepcopy(model)
    twin.generation_config.eos_token_id = [150, third]
    text = "".join(stream(twin, tokenizer, "w1 w2", max_new_tokens=8, chat=False))
    assert text.split()[: first + 1] == tokens[: first + 1]
    assert len(text.split()) == first + 1


def test_sampling_follows_the_seed_and_leaves_the_global_state(talker):
    model, tokenizer = talker
    torch.manual_seed(11)
    before = torch.get_rng_state()
    options = {"max_new_tokens": 8, "temperature": 2.0, "top_p": 0.95, "chat": False}
    texts = ["".join(stream(model, tokenizer, "w1", seed=s, **options)) for s in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1
    assert torch.equal(torch.get_rng_state(), before)


def test_closing_the_stream_ends_the_thread(talker):
    model, tokenizer = talker
    pieces = stream(model, tokenizer, "w1", max_new_tokens=50, chat=False)
    next(pieces)
    pieces.close()
    assert not [t for t in threading.enumerate() if t.name == "sketchconv-generate"]


def test_errors_of_the_model_reach_the_caller(talker, monkeypatch):
    model, tokenizer = talker
    broken = copy.deepcopy(model)

    def fail(*_args, **_kwargs):
        raise ZeroDivisionError("inside the model")

    monkeypatch.setattr(broken.model, "forward", fail)
    with pytest.raises(ZeroDivisionError, match="inside the model"):
        list(stream(broken, tokenizer, "w1", chat=False))


def test_requests_that_cannot_be_met(talker, bundle):
    model, tokenizer = talker
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(LoadError, match="no chat template"):
        stream(model, bare, "w1", chat=True)
    with pytest.raises(LoadError, match="needs a chat template"):
        stream(model, bare, "w1", system="w2")
    with pytest.raises(LoadError, match="prompt is empty"):
        stream(model, bare, "")
    base = sketchconv.load(bundle.path, "AutoModel")
    with pytest.raises(LoadError, match="does not generate"):
        stream(base, tokenizer, "w1")
    assert Path(bundle.path).exists()
