"""The engine and the text pieces: joining, leaving, failing, stopping."""

from __future__ import annotations

import queue
import threading
import time

import pytest
import torch

from sketchconv.serving import rows as rows_module
from sketchconv.serving.problems import Problem
from sketchconv.serving.rows import Rows, together
from sketchconv.serving.sampling import pick, source
from sketchconv.serving.text import Pieces
from sketchconv.serving.wanted import Sampling, Wanted

GREEDY = Sampling(8, 0.0, 1.0, None, ())


def submit(service, prompt="w5 w6 w7", model="talker", sampling=GREEDY, ends=None):
    """A job under way and the queue of its events; `ends` gets the models in order of their end."""
    events = queue.Queue()

    def send(event):
        if event.finish is not None and ends is not None:
            ends.append(model)
        events.put(event)

    messages = () if prompt is not None else ({"role": "user", "content": "w5"},)
    job = service.job(Wanted(model, prompt, messages, sampling, False, False), send)
    service.engine.submit(job)
    return job, events


def finished(events):
    """The text of an answer, waited for."""
    text = ""
    while True:
        event = events.get(timeout=60)
        if event.problem is not None:
            raise event.problem
        text += event.text
        if event.finish is not None:
            return text


def settled(check):
    """Wait until the engine's thread has seen to it."""
    for _ in range(600):
        if check():
            return True
        time.sleep(0.05)
    return False


ENDLESS = Sampling(100, 0.0, 1.0, None, ())


def held(engine, monkeypatch, call):
    """An event before which the engine's forward number `call` does not begin."""
    forward, open_gate, calls = engine._forward, threading.Event(), []

    def run(*args):
        calls.append(1)
        if len(calls) >= call:
            assert open_gate.wait(60)
        return forward(*args)

    monkeypatch.setattr(engine, "_forward", run)
    return open_gate


def test_an_answer_that_nobody_wants_frees_its_place(service, alone, monkeypatch):
    made = service(concurrent=1)
    gate = held(made.engine, monkeypatch, 4)
    job, events = submit(made, sampling=ENDLESS)
    waiting, _ = submit(made, sampling=ENDLESS)
    third, third_events = submit(made, model="one")
    events.get(timeout=60)
    made.engine.cancel(waiting)
    made.engine.cancel(job)
    gate.set()
    assert finished(third_events).split() == alone("one", "w5 w6 w7", 8).split()
    assert settled(lambda: made.engine.running == 0 and made.engine.waiting == 0)
    assert third.done
    assert job.tokens < 5
    assert waiting.tokens == 0


def test_a_later_request_joins_what_runs(service, alone, monkeypatch):
    made = service(concurrent=2)
    gate = held(made.engine, monkeypatch, 4)
    ends = []
    _, events = submit(made, sampling=ENDLESS, prompt="w1 w2 w3 w4 w8", ends=ends)
    first = events.get(timeout=60)
    _, joined = submit(made, model="two", ends=ends)
    gate.set()
    assert finished(joined).split() == alone("two", "w5 w6 w7", 8).split()
    text = first.text + finished(events)
    assert ends == ["two", "talker"]  # it did not wait for the end of the other
    assert text.split() == alone("talker", "w1 w2 w3 w4 w8", 100).split()


def test_long_prompts_are_read_without_padding(service, alone, monkeypatch):
    monkeypatch.setattr(rows_module, "MASK_BYTES", 5 * 2 * 10**2)  # two prompts of 10 tokens
    made = service()
    forward, reads = made.engine._forward, []

    def noted(ids, *args):
        if ids.shape[1] > 1:
            reads.append(tuple(ids.shape))
        return forward(ids, *args)

    monkeypatch.setattr(made.engine, "_forward", noted)
    words = [f"w{n}" for n in range(10, 30)]
    prompts = [" ".join(words), "w5 w6 w7", "w1 w2 w3 w4", " ".join(words[::-1])]
    models = ["talker", "one", "two", "one"]
    with made.engine._bell:  # so that they all come at once
        asked = [submit(made, p, m)[1] for p, m in zip(prompts, models, strict=True)]
    for prompt, model, events in zip(prompts, models, asked, strict=True):
        assert finished(events).split() == alone(model, prompt, 8).split()
    assert reads == [(1, 20), (2, 4), (1, 20)]


def test_prompts_are_read_together_while_their_mask_is_small():
    assert together([100, 5, 1000, 7, 9, 200, 300, 1000], 8) == 8
    assert together([100, 5, 1000], 2) == 2
    assert together([8000, 10], 8) == 1
    assert together([10, 8000], 8) == 1
    assert together([3000] * 8, 8) == 1
    assert together([5], 0) == together([], 8) == 0


def test_a_failing_step_gives_up_its_answers_and_nothing_else(service, alone, monkeypatch):
    made = service()
    forward = made.engine._forward
    calls = []

    def broken(*args):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("no room")
        return forward(*args)

    monkeypatch.setattr(made.engine, "_forward", broken)
    _, events = submit(made)
    with pytest.raises(Problem, match="the model failed"):
        finished(events)
    _, events = submit(made, model="one")
    assert finished(events).split() == alone("one", "w5 w6 w7", 8).split()


def test_closing_ends_what_runs_and_refuses_more(service, monkeypatch):
    made = service()
    gate = held(made.engine, monkeypatch, 4)  # so that it cannot be complete by then
    _, events = submit(made, sampling=ENDLESS)
    events.get(timeout=60)
    closing = threading.Thread(target=made.engine.close)
    closing.start()
    assert settled(lambda: not made.engine.alive)
    gate.set()
    closing.join()
    with pytest.raises(Problem, match="stopping"):
        finished(events)
    with pytest.raises(Problem, match="stopping"):
        submit(made)
    made.engine.close()


def test_rows_join_and_leave():
    from transformers import DynamicCache

    def rows(counts, width):
        cache = DynamicCache()
        mask = torch.tensor([[0] * (width - n) + [1] * n for n in counts])
        states = torch.randn(len(counts), 2, width, 3) * mask[:, None, :, None]
        cache.update(states, 2 * states, 0)
        return Rows(cache, mask), states

    first, one = rows([2, 4], 4)
    second, two = rows([6], 6)
    joined = first.join(second)
    assert joined.lengths.tolist() == [2, 4, 6]
    layer = joined.cache.layers[0]
    assert torch.equal(layer.keys[:2, :, 2:], one)
    assert torch.equal(layer.keys[2:], two)
    kept = joined.keep([0, 1])
    assert kept.mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert torch.equal(kept.cache.layers[0].values, 2 * one)


def test_sampling_keeps_to_the_likeliest_tokens():
    logits = torch.tensor([2.0, 1.0, 0.5, -9.0])
    greedy = Sampling(1, 0.0, 1.0, 0, ())
    assert pick(logits, greedy, source(greedy)) == 0
    narrow = Sampling(1, 1.0, 0.7, 3, ())
    random = source(narrow)
    assert {pick(logits, narrow, random) for _ in range(200)} == {0, 1}
    tiny = Sampling(1, 2.0, 1e-9, 3, ())
    assert {pick(logits, tiny, source(tiny)) for _ in range(20)} == {0}
    wide = Sampling(1, 1.0, 1.0, 3, ())
    counts = [pick(logits, wide, random) for _ in range(3000)].count(0) / 3000
    assert abs(counts - float(logits.softmax(0)[0])) < 0.05


class Letters:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids, **_):
        return bytes(ids).decode("utf-8", errors="replace")


def spoken(text, stop=()):
    pieces = Pieces(Letters(), stop)
    made = []
    for byte in text.encode():
        made.append(pieces.add(byte))
        if pieces.stopped:
            break
    return made, pieces


def test_pieces_hold_whole_characters():
    made, pieces = spoken("añ😀b")
    assert [piece for piece in made if piece] == ["a", "ñ", "😀", "b"]
    assert pieces.rest() == ""
    half = Pieces(Letters())
    assert half.add("ñ".encode()[0]) == ""
    assert half.rest() == "\ufffd"


def test_pieces_go_on_after_a_prompt():
    half = Pieces(Letters(), before="xyñ".encode()[:3])
    assert half.add("ñ".encode()[1]) == "ñ"
    assert half.add(ord("b")) == "b"
    whole = Pieces(Letters(), before="x\ufffd".encode())
    assert whole.add(ord("b")) == "b"
    assert Pieces(Letters(), before=b"xy").rest() == ""
    stopped = Pieces(Letters(), ("yz",), before=b"xy")  # a stop is of the answer alone
    assert stopped.add(ord("z")) == "z"


def test_a_completion_keeps_the_space_after_its_prompt(service, alone, monkeypatch):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({f"▁w{n}": n for n in range(151)}, unk_token="▁w0"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made = service()
    monkeypatch.setattr(made, "_tokenizer", PreTrainedTokenizerFast(
        tokenizer_object=raw, chat_template="w5 w6 w7"
    ))  # fmt: skip
    expected = alone("talker", "w5 w6 w7", 8)
    assert finished(submit(made)[1]) == " " + expected
    assert finished(submit(made, prompt=(5, 6, 7))[1]) == " " + expected
    assert finished(submit(made, prompt=None)[1]) == expected  # a chat


def test_pieces_hold_back_what_may_be_a_stop():
    made, pieces = spoken("one ENDo END two", ("ENDS", "END t"))
    assert "".join(made) == "one ENDo "
    assert pieces.stopped
    assert pieces.rest() == ""
    made, pieces = spoken("one EN", ("END",))
    assert "".join(made) == "one "
    assert pieces.rest() == "EN"
