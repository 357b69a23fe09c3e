"""Multiple-choice questions."""

from __future__ import annotations

import json

import pytest
import torch

from sketchconv.errors import EvaluationError
from sketchconv.evaluation.choices import (
    Question,
    answer_questions,
    continued,
    read_questions,
)
from sketchconv.evaluation.network import Network


def written(tmp_path, *records):
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return path


def test_reading(tmp_path):
    path = written(
        tmp_path,
        {"question": "a?", "choices": ["x", "y"], "answer": 1},
        "",
        {"context": "b", "question": "c?", "choices": ["x", "y", "z"], "answer": "c"},
        {"prompt": "d", "choices": ["no", "yes"], "answer": "no"},
    )
    assert read_questions(path) == (
        Question("a?", ("x", "y"), 1),
        Question("b\nc?", ("x", "y", "z"), 2),
        Question("d", ("no", "yes"), 0),
    )


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: expected an object, got list"),
        ({"choices": ["x", "y"], "answer": 0}, "needs a text under"),
        ({"question": 3, "choices": ["x", "y"], "answer": 0}, "needs a text under"),
        ({"question": "q", "choices": ["x"], "answer": 0}, "at least two"),
        ({"question": "q", "choices": "xy", "answer": 0}, "at least two"),
        ({"question": "q", "choices": ["x", " "], "answer": 0}, "at least two"),
        ({"question": "q", "choices": ["x", "y"], "answer": 2}, "from 0 to 1.*got 2"),
        ({"question": "q", "choices": ["x", "y"], "answer": True}, "got True"),
        ({"question": "q", "choices": ["x", "y"], "answer": "C"}, "got 'C'|got 2"),
        ({"question": "q", "choices": ["x", "y"]}, "got None"),
        ({"question": "q", "choices": ["x", "y"], "answer": "\u00df"}, "line 2: answer must"),
        ("[" * 200_000, "line 2: not JSON"),
        ({"question": "q \ud83d", "choices": ["x", "y"], "answer": 0}, r"line 2: \\ud83d is half"),
        ({"question": "q", "choices": ["x", "\ude00"], "answer": 0}, r"line 2: \\ude00 is half"),
    ],
)
def test_bad_lines_are_named(tmp_path, record, message):
    good = {"question": "q", "choices": ["x", "y"], "answer": 0}
    with pytest.raises(EvaluationError, match=message):
        read_questions(written(tmp_path, good, record))


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"question": "q", "choices": ["x", "y"], "answer": 1}')
    assert read_questions(path) == (Question("q", ("x", "y"), 1),)


def test_a_broken_model_answers_nothing(makers):
    model = makers.model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(EvaluationError, match="broken: gives NaN"):
        answer_questions(
            Network(model, "broken"), makers.tokenizer(), [Question("w1", ("w2", "w3"), 0)]
        )


def test_a_question_that_does_not_fit_is_named(makers):
    words = makers.tokenizer()
    short = Network(makers.model("GPT2LMHeadModel", max_position_embeddings=16), "m")
    fits = Question(makers.text(15), ("w1", "w2"), 0, "q.jsonl, line 1")
    answer_questions(short, words, [fits])
    longer = Question(makers.text(15), ("w1 w2", "w2"), 0, "q.jsonl, line 2")
    with pytest.raises(EvaluationError, match=r"line 2: 17 tokens .* m has positions for 16"):
        answer_questions(short, words, [fits, longer])
    few = Network(makers.model(vocab_size=40), "m")
    unknown = Question("w1", ("w2", "w60"), 0, "q.jsonl, line 3")
    with pytest.raises(EvaluationError, match="line 3: token 63, but m has an embedding of 40"):
        answer_questions(few, words, [unknown])


def test_no_question_at_all(tmp_path):
    with pytest.raises(EvaluationError, match="holds no question"):
        read_questions(written(tmp_path, "", ""))


def test_a_choice_begins_where_the_prompt_ends(makers):
    tokens, begin = continued(makers.tokenizer(bos=True), "w1 w2 ", "w3 w4")
    assert (tokens, begin) == ([1, 4, 5, 6, 7], 3)


def test_answers_as_scored_one_by_one(makers):
    model, tokenizer = makers.model(), makers.tokenizer()
    generator = torch.Generator().manual_seed(2)
    questions, plain, per_byte = [], 0, 0
    for n in range(12):
        lengths = (1, 4, 2)
        choices = tuple(makers.text(k, seed=31 * n + k) for k in lengths)
        question = Question(
            makers.text(6, seed=n), choices, int(torch.randint(3, (1,), generator=generator))
        )
        sums = []
        for choice in choices:
            ids = torch.tensor([tokenizer(f"{question.prompt} {choice}")["input_ids"]])
            with torch.inference_mode():
                logs = torch.log_softmax(model(ids).logits[0].float(), -1)
            sums.append(sum(logs[i - 1, ids[0, i]].item() for i in range(6, ids.shape[1])))
        normal = [s / len(c.encode()) for s, c in zip(sums, choices, strict=True)]
        plain += sums.index(max(sums)) == question.answer
        per_byte += normal.index(max(normal)) == question.answer
        questions.append(question)
    found = answer_questions(Network(model, "m"), tokenizer, questions)
    assert found.questions == 12
    assert found.accuracy == plain / 12
    assert found.accuracy_per_byte == per_byte / 12
    assert found.chance == pytest.approx(1 / 3)
