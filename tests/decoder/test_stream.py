"""The compiled loop in `generate.stream` and in the command line."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

import sketchconv
from sketchconv.cli.generate import command
from sketchconv.kernels.decoder.session import Session
from sketchconv.kernels.dispatch import choose
from sketchconv.runtime.generate import Pace, stream


@pytest.fixture
def bundle(makers, tmp_path):
    """A bundle with a tokenizer of the words w0 to w150."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(151)}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = makers.build("LlamaForCausalLM", eos_token_id=None)
    return makers.write(model, tmp_path / "talker.sktch", files=files)


@pytest.fixture
def steps(monkeypatch):
    """Positions of the compiled steps that ran."""
    made = []
    step = Session.step
    monkeypatch.setattr(
        Session, "step", lambda self, *args: made.append(args[1]) or step(self, *args)
    )
    return made


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_stream_is_the_same_in_either_loop(bundle, steps, temperature):
    model, tokenizer = sketchconv.load(bundle.path), sketchconv.load_tokenizer(bundle.path)
    options = {"max_new_tokens": 12, "temperature": temperature}
    theirs = "".join(stream(model, tokenizer, "w5 w6 w7", own_loop=False, **options))
    assert steps == []
    assert "".join(stream(model, tokenizer, "w5 w6 w7", **options)) == theirs
    assert steps == list(range(3, 14))


def test_a_closed_stream_puts_the_model_back(bundle):
    model, tokenizer = sketchconv.load(bundle.path), sketchconv.load_tokenizer(bundle.path)
    pieces = stream(model, tokenizer, "w5", max_new_tokens=5000)
    next(pieces)
    assert "forward" in vars(model)
    pieces.close()
    assert "forward" not in vars(model)


def test_a_model_that_the_loop_does_not_know_is_streamed_all_the_same(bundle, steps):
    model, tokenizer = sketchconv.load(bundle.path), sketchconv.load_tokenizer(bundle.path)
    expected = "".join(stream(model, tokenizer, "w5", max_new_tokens=5))
    steps.clear()
    model.model.layers[0].register_forward_hook(lambda *args: None)
    assert "".join(stream(model, tokenizer, "w5", max_new_tokens=5)) == expected
    assert steps == []


def test_the_command_says_which_loop_ran(bundle):
    run = CliRunner().invoke
    before = torch.get_num_threads()
    args = [str(bundle.path), "w5 w6", "--max-new-tokens", "4", "--threads", "2"]
    own, theirs = run(command, args), run(command, [*args, "--no-own-loop"])
    torch.set_num_threads(before)
    assert own.exit_code == theirs.exit_code == 0
    assert f"(own decode loop, {choose().name} kernels, 1 thread)" in own.stderr
    assert "(transformers' loop, as asked)" in theirs.stderr
    assert own.stdout == theirs.stdout


@pytest.mark.parametrize("own_loop", [True, False])
def test_the_pace_counts_tokens(bundle, own_loop):
    model, tokenizer = sketchconv.load(bundle.path), sketchconv.load_tokenizer(bundle.path)
    pace = Pace()
    options = {"max_new_tokens": 7, "own_loop": own_loop, "pace": pace}
    pieces = list(stream(model, tokenizer, "w1 w2", **options))
    assert pace.tokens == 7
    assert pieces
    assert pace.per_second == 6 / (pace.last - pace.first)
    assert Pace().per_second == 0
