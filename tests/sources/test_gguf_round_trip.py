"""Everything that can be exported to GGUF comes back: weights, config, logits and tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

pytest.importorskip("torch")
pytest.importorskip("transformers")

from test_tokenizer import texts
from tiny import MODELS, make_model, make_tokenizer

from sketchconv.export.dense import export_dense
from sketchconv.export.recipe import ExportRecipe
from sketchconv.export.run import export_gguf
from sketchconv.sources.gguf import GgufSource
from sketchconv.sources.gguf_splitters import SPLITTERS

# What a GGUF file cannot say, and what does not change what a trained model computes.
UNSAID = {"initializer_range", "_name_or_path", "transformers_version", "architectures"}
UNSAID |= {"resid_pdrop", "attn_pdrop", "embd_pdrop", "use_sliding_window", "max_window_layers"}


@pytest.fixture(scope="module")
def trips(tmp_path_factory):
    """The first folder, the GGUF file and the second folder of a kind, made once."""
    made: dict[str, tuple[Path, Path, Path]] = {}

    def get(kind):
        if kind not in made:
            root = tmp_path_factory.mktemp("trip")
            first = make_model(root / kind.replace("phi3", "fi"), kind)
            made[kind] = first, *there_and_back(first)
        return made[kind]

    return get


def there_and_back(folder, type_name="F32"):
    path, back = folder.parent / "model.gguf", folder.parent / "back"
    export_gguf(folder, path, ExportRecipe(type_name))
    export_dense(path, back)
    return path, back


def weights(folder):
    return load_file(folder / "model.safetensors")


def bits(value):
    return value.view({4: np.uint32, 2: np.uint16}[value.itemsize])


def model(folder):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def logits(folder, length):
    import torch

    with torch.no_grad():
        return model(folder)(torch.arange(length)[None] * 7 % 300).logits


@pytest.mark.parametrize("kind", MODELS)
def test_weights_come_back_bit_for_bit(trips, kind):
    first, _, second = trips(kind)
    wanted, found = weights(first), weights(second)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        if kind.startswith("gemma") and "norm" in name:
            # The file has 1 + w rounded to float32: that, which is what the model uses, is exact.
            one = np.float32(1)
            np.testing.assert_array_equal(bits(found[name] + one), bits(value + one))
            np.testing.assert_array_equal(bits(found[name]), bits((value + one) - one))
        else:
            np.testing.assert_array_equal(bits(found[name]), bits(value))


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_norms_of_published_gemmas_come_back_bit_for_bit(kind, tmp_path):
    """Those are bfloat16, of which 1 + w is exact."""
    first = make_model(tmp_path / "m", kind, dtype="bfloat16")
    _, second = there_and_back(first, "BF16")
    import torch
    from safetensors.torch import load_file as load

    wanted, found = (load(folder / "model.safetensors") for folder in (first, second))
    for name, value in wanted.items():
        assert torch.equal(found[name].to(torch.bfloat16), value), name
        assert torch.equal(found[name].float(), value.float()), name
        assert found[name].dtype == (torch.float32 if "norm" in name else torch.bfloat16)


@pytest.mark.parametrize("kind", MODELS)
def test_logits_come_back_bit_for_bit(trips, kind):
    import torch

    first, _, second = trips(kind)
    # Beyond the windows of 16, and beyond the original length of the scaled kinds.
    for length in (5, 100, *((300,) if kind == "phi3-long" else ())):
        wanted, found = logits(first, length), logits(second, length)
        assert wanted.std() > 0.1
        assert torch.equal(wanted, found)


@pytest.mark.parametrize("kind", MODELS)
def test_the_config_says_the_same(trips, kind):
    from transformers import AutoConfig

    first, _, second = trips(kind)
    wanted, found = (AutoConfig.from_pretrained(x).to_dict() for x in (first, second))
    if kind == "mistral":
        # One architecture in GGUF; without a window the same model.
        assert (wanted.pop("model_type"), found["model_type"]) == ("mistral", "llama")
    for key in wanted.keys() - UNSAID:
        assert narrow(found.get(key)) == narrow(wanted[key]), key
    assert json.loads((second / "config.json").read_text())["dtype"] == "float32"


def narrow(value):
    """Numbers as float32, in which GGUF and the models keep them."""
    if isinstance(value, dict):
        return {key: narrow(item) for key, item in value.items()}
    if isinstance(value, list):
        return [narrow(item) for item in value]
    return np.float32(value) if isinstance(value, float) else value


@pytest.mark.parametrize("kind", MODELS)
def test_the_tokenizer_that_comes_back_is_of_the_same_kind(trips, kind):
    first, _, second = trips(kind)
    check_same_tokens(first, second, texts(40))


def check_same_tokens(first, second, given):
    from transformers import AutoTokenizer

    wanted, found = (AutoTokenizer.from_pretrained(folder) for folder in (first, second))
    assert found.get_vocab() == wanted.get_vocab()
    for role in ("bos", "eos", "unk", "pad"):
        assert getattr(found, f"{role}_token_id") == getattr(wanted, f"{role}_token_id")
    for text in (*given, "<s>a </s><pad> b", "the fox</s>", ""):
        assert found.encode(text) == wanted.encode(text), text
        assert found.encode(text, add_special_tokens=False) == wanted.encode(
            text, add_special_tokens=False
        ), text


@pytest.mark.parametrize("kind", ["spm", *SPLITTERS])
def test_every_tokenizer_gives_the_same_ids(trips, kind, tmp_path):
    """All strings that exports are tried with; and templates and flags come back."""
    first = tmp_path / "model"
    make_model(first, "llama", num_hidden_layers=1)
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    named = [{"name": n, "template": template + n} for n in ("default", "tool_use")]
    make_tokenizer(first, kind, chat_template=named)
    _, second = there_and_back(first, "F16")
    check_same_tokens(first, second, texts())
    assert (second / "chat_template.jinja").read_text() == template + "default"
    extra = second / "additional_chat_templates" / "tool_use.jinja"
    assert extra.read_text() == template + "tool_use"


@pytest.mark.parametrize("kind", ["gpt2", "phi3", "gemma2"])
def test_rows_can_be_cut_anywhere(trips, kind):
    with GgufSource(trips(kind)[1]) as source:
        for name, info in source.infos.items():
            count = info.shape[0]
            whole = source.float32(name, source.rows(name, 0, count))
            assert whole.shape == info.shape
            for begin, end in ((0, 1), (count // 3, count // 2), (count - 1, count), (5, 5)):
                part = source.float32(name, source.rows(name, begin, end))
                np.testing.assert_array_equal(part, whole[begin:end])
                stored = source.stored(name, source.rows(name, begin, end))
                assert len(stored) == info.nbytes // count * (end - begin)
