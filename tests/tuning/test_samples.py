"""Documents, what is learned of them, and rows that hold several."""

from __future__ import annotations

import json

import pytest
import torch

import sketchconv
from sketchconv.errors import TuningError
from sketchconv.tuning.documents import read_documents
from sketchconv.tuning.material import gather
from sketchconv.tuning.options import TuneOptions
from sketchconv.tuning.packing import Collator, keeps_samples_apart, pack
from sketchconv.tuning.samples import IGNORED, Sample, Tokens

EOS = "</s>"


@pytest.fixture
def jsonl(tmp_path):
    def write(*lines):
        path = tmp_path / "data.jsonl"
        text = (line if isinstance(line, str) else json.dumps(line) for line in lines)
        path.write_text("\n".join(text))
        return path

    return write


def learned(tokenizer, path, seq_len=200):
    """The learned parts of each sample as text, and the whole of it."""
    tokens = Tokens(tokenizer, seq_len)
    found = []
    for sample in tokens.samples(read_documents(path)).samples:
        kept = [t for t, label in zip(sample.ids, sample.labels, strict=True) if label != IGNORED]
        assert all(
            label in (t, IGNORED) for t, label in zip(sample.ids, sample.labels, strict=True)
        )
        words = ("".join(tokenizer.convert_ids_to_tokens(ids)) for ids in (kept, sample.ids))
        found.append(tuple(words))
    return found


def chat(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": c} for n, c in enumerate(contents)]


def test_text_is_learned_whole(jsonl, makers):
    path = jsonl({"text": "abc"}, "", {"text": "de"})
    tokenizer = makers.tokenizer()
    assert learned(tokenizer, path) == [("abc" + EOS,) * 2, ("de" + EOS,) * 2]


def test_of_a_completion_only_the_completion(jsonl, makers):
    path = jsonl({"prompt": "two and two? ", "completion": "four."})
    expected = [("four." + EOS, "two and two? four." + EOS)]
    assert learned(makers.tokenizer(), path) == expected


def test_of_a_chat_only_assistant_turns(jsonl, makers):
    """Against the plain reading of the template: what follows its generation prompt."""
    path = jsonl({"messages": chat("hi", "yes?", "go on", "no.")})
    whole = "<|user|>hi<|end|><|assistant|>yes?<|end|><|user|>go on<|end|><|assistant|>no.<|end|>"
    assert learned(makers.tokenizer(), path) == [("yes?<|end|>no.<|end|>", whole)]


def test_of_a_conversational_completion_only_the_last_turn(jsonl, makers):
    turns = chat("hi", "yes?", "go on", "no.")
    path = jsonl({"prompt": turns[:3], "completion": turns[3:]})
    assert learned(makers.tokenizer(), path)[0][0] == "no.<|end|>"


def test_long_texts_are_cut_into_samples_and_nothing_is_lost(jsonl, makers):
    text = "abcdefghij" * 5
    found = learned(makers.tokenizer(), jsonl({"text": text}), seq_len=16)
    assert [len(part.replace(EOS, "!")) for part, _ in found] == [16, 16, 16, 3]
    assert "".join(part for part, _ in found) == text + EOS


def test_a_bos_token_opens_every_sample(jsonl, makers):
    tokenizer = makers.tokenizer()
    tokens = Tokens(tokenizer, 8)
    tokens.opening = [1]
    found = tokens.samples(read_documents(jsonl({"text": "abcdefghijkl"}))).samples
    assert [s.ids[0] for s in found] == [1, 1]
    assert [s.labels[0] for s in found] == [IGNORED, IGNORED]
    assert found[0].learned == 7


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        ([{"text": "a"}, "{"], r"data\.jsonl: line 2: not JSON"),
        (["[1]"], "line 1: expected an object, got list"),
        ([{"text": "a"}, "", {"question": "b"}], r"line 3: expected text, messages.*question"),
        ([{"prompt": "a", "completion": []}], "line 1: expected text"),
        ([{"messages": []}], "line 1: messages must be a list of messages, and not empty"),
        ([{"messages": [{"content": "a"}]}], r"line 1: messages\[0\] is no object with a role"),
        (["", " "], "holds no text"),
    ],
)
def test_bad_lines_are_named(jsonl, lines, match):
    with pytest.raises(TuningError, match=match):
        list(read_documents(jsonl(*lines)))


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"text": "a \\ud83d b"}', "line 2: holds half of a surrogate pair"),
        ('{"messages": [{"role": "user", "content": "\\udc00"}]}', "line 2: holds half"),
        ("[" * 100_000, "line 2: not JSON"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": 5}', "tools must be a list"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": "{"}', "tools is a text that"),
        ('{"messages": [{"role": "user", "content": 5}]}', r"messages\[0\]: its content must be"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "parts of type text"),
    ],
)
def test_lines_that_no_tokenizer_or_template_takes(jsonl, line, match):
    path = jsonl({"text": "\U0001f600 is a whole pair"}, line)
    with pytest.raises(TuningError, match=match):
        list(read_documents(path))


def test_a_chat_that_begins_with_the_assistant(jsonl, makers):
    path = jsonl({"messages": [{"role": "assistant", "content": "the cat"}]})
    with pytest.raises(TuningError, match="line 1: begins with the assistant's turn"):
        learned(makers.tokenizer(), path)


def test_content_in_parts_and_tools_as_text_and_a_byte_order_mark(jsonl, makers):
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": parts}]
    path = jsonl({"messages": turns, "tools": '[{"name": "f"}]'})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    (found,) = read_documents(path)
    assert found.messages[1]["content"] == "the cat"
    assert found.tools == ({"name": "f"},)
    assert learned(makers.tokenizer(), path)[0][0] == "the cat<|end|>"


def test_no_such_file_and_no_text(tmp_path):
    with pytest.raises(TuningError, match="no such file"):
        list(read_documents(tmp_path / "none.txt"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(TuningError, match="byte 3 is not UTF-8"):
        list(read_documents(tmp_path / "latin.txt"))


def test_a_chat_without_a_template(jsonl, makers):
    path = jsonl({"messages": chat("hi", "yes")})
    with pytest.raises(TuningError, match=r"line 1: a chat, but.*no chat template"):
        learned(makers.tokenizer(None), path)


def test_a_template_that_rewrites_earlier_turns(jsonl, makers):
    template = (
        "{% for m in messages %}{{ m.content if loop.last else '?' }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    path = jsonl({"messages": chat("hi", "yes", "ah", "no")})
    with pytest.raises(TuningError, match="turn 2 cannot be told apart"):
        learned(makers.tokenizer(template), path)


def test_a_template_that_refuses(jsonl, makers):
    path = jsonl({"messages": chat("hi", "yes")})
    with pytest.raises(TuningError, match=r"line 1: the chat template refused it \(no users"):
        learned(makers.tokenizer("{{ raise_exception('no users') }}"), path)


def options(**changes):
    return TuneOptions(**{"seq_len": 16, **changes})


def test_nothing_to_learn(jsonl, makers):
    path = jsonl({"prompt": "a" * 30, "completion": "b"})
    with pytest.raises(TuningError, match="no tokens to learn: 1 samples"):
        gather(makers.tokenizer(), path, None, 60, options())


def test_shorter_than_one_window(tmp_path, makers):
    path = tmp_path / "short.txt"
    path.write_text("abc")
    with pytest.raises(TuningError, match="4 tokens are fewer than one window of 16"):
        gather(makers.tokenizer(), path, None, 60, options())
    path.write_text("abcdefghijklmno")
    with pytest.raises(TuningError, match="one sample is not enough to hold one out"):
        gather(makers.tokenizer(), path, None, 60, options())


def test_ids_beyond_the_vocabulary(jsonl, makers):
    path = jsonl({"text": "abc"}, {"text": "xyz"})
    with pytest.raises(TuningError, match="gives token 31, but the model knows 20"):
        gather(makers.tokenizer(), path, None, 20, options())


def test_held_out_samples_are_trained_on_nowhere(jsonl, makers, tmp_path):
    path = jsonl(*({"text": f"number {n}"} for n in range(40)))
    found = gather(makers.tokenizer(), path, None, 60, options(eval_share=0.2))
    rows = [{s.ids for row in part for s in row} for part in (found.rows, found.held_out)]
    assert len(rows[1]) == 8
    assert len(rows[0] | rows[1]) == 40
    assert found == gather(makers.tokenizer(), path, None, 60, options(eval_share=0.2))
    other = tmp_path / "eval.txt"
    other.write_text("abcdefghij" * 20)
    found = gather(makers.tokenizer(), path, other, 60, options(most_eval_tokens=40))
    assert [sum(len(s.ids) for s in row) for row in found.held_out] == [16, 16]
    assert sum(len(row) for row in found.rows) == 40


def sample(*ids):
    return Sample(ids, ids)


def test_packing_fills_rows_and_loses_nothing():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 33, (200,), generator=generator).tolist()
    samples = [sample(*[n % 50] * size) for n, size in enumerate(sizes)]
    rows = pack(samples, 32)
    assert sorted(s for row in rows for s in map(id, row)) == sorted(map(id, samples))
    used = [sum(len(s.ids) for s in row) for row in rows]
    assert max(used) <= 32
    assert sum(used) / (32 * len(rows)) > 0.95
    assert rows == pack(samples, 32)


def test_a_batch():
    rows = [(sample(5, 6, 7), sample(8, 9)), (sample(3, 4),)]
    batch = Collator(0)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [3, 4, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9], [-100, 4, -100, -100, -100]]
    assert "position_ids" not in Collator(0)(rows[1:])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_samples_equal_separate_ones(tiny, attention):
    """Losses and LUT gradients of samples in one row are those of each sample alone."""
    samples = [sample(*range(6, 20)), sample(30, 31, 9), sample(*range(12, 25))]
    found = []
    for rows in ([tuple(samples)], [(s,) for s in samples]):
        model = sketchconv.load(tiny, attn_implementation=attention)
        sketchconv.prepare_for_lut_training(model, gradient="sum")
        total = 0.0
        for row in rows:
            batch = Collator(0)([row])
            count = int((batch["labels"] != IGNORED).sum())
            loss = model(**batch, use_cache=False).loss * count
            loss.backward()
            total += float(loss.detach())
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        found.append((total, torch.cat([g.view(-1) for g in gradients])))
    (one, first), (other, second) = found
    assert one == pytest.approx(other, rel=1e-5)
    assert torch.allclose(first, second, rtol=0, atol=1e-5 * float(second.abs().max()))


def test_models_are_tried_before_samples_share_rows(tiny, makers, monkeypatch):
    model = sketchconv.load(tiny)
    assert keeps_samples_apart(model)
    forward = type(model).forward

    def deaf(self, *args, position_ids=None, **kwargs):
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", deaf)
    assert not keeps_samples_apart(model)
