"""Cutting a text into windows."""

from __future__ import annotations

import pytest

from sketchconv.errors import EvaluationError
from sketchconv.evaluation.windows import Cut, cut_windows, opening_tokens, read_text


def predicted(windows):
    """The tokens that windows predict, in order."""
    return [int(t) for w in windows for t in w.ids[w.first + 1 :]]


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_windows_that_touch_leave_out_their_first_tokens_only(makers):
    tokenizer, text = makers.tokenizer(), makers.text(35)
    windows = cut_windows(tokenizer, text, Cut(10, None, None), "text")
    ids = ids_of(tokenizer, text)
    assert [w.ids.tolist() for w in windows] == [ids[0:10], ids[10:20], ids[20:30]]
    assert predicted(windows) == ids[1:10] + ids[11:20] + ids[21:30]
    assert sum(w.scored for w in windows) == 27


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_overlapping_windows_predict_every_token_once(makers, bos, stride):
    tokenizer, text = makers.tokenizer(bos=bos), makers.text(34)
    windows = cut_windows(tokenizer, text, Cut(10, stride, None), "text")
    body = 9 if bos else 10
    covered = body + stride * (len(windows) - 1)
    assert predicted(windows) == ids_of(tokenizer, text)[1:covered]
    assert all(w.ids.shape == (10,) for w in windows)
    assert all(w.ids[0] == 1 for w in windows) == bos


def test_a_stride_never_leaves_a_gap_behind_opening_tokens(makers):
    tokenizer, text = makers.tokenizer(bos=True), makers.text(40)
    windows = cut_windows(tokenizer, text, Cut(10, 10, None), "text")
    assert [w.ids[1:].tolist() for w in windows][:2] == [
        ids_of(tokenizer, text)[0:9],
        ids_of(tokenizer, text)[9:18],
    ]


def test_only_the_first_windows(makers):
    assert len(cut_windows(makers.tokenizer(), makers.text(35), Cut(10, None, 2), "text")) == 2


def test_opening_tokens(makers):
    assert opening_tokens(makers.tokenizer(bos=True)) == [1]
    assert opening_tokens(makers.tokenizer()) == []


def test_a_short_text_is_refused(makers):
    with pytest.raises(EvaluationError, match="tale: 9 tokens are fewer than one window of 10"):
        cut_windows(makers.tokenizer(), makers.text(9), Cut(10), "tale")


@pytest.mark.parametrize(("seq_len", "stride"), [(1, None), (10, 0), (10, 11)])
def test_impossible_windows_are_refused(seq_len, stride):
    with pytest.raises(EvaluationError, match="stride is between"):
        Cut(seq_len, stride)


def test_no_windows_are_refused():
    with pytest.raises(EvaluationError, match="must be positive"):
        Cut(10, None, 0)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbfw1 w2")
    assert read_text(tmp_path / "text.txt") == "w1 w2"


def test_texts_that_are_none(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"good \xff bad")
    with pytest.raises(EvaluationError, match="byte 5 is not UTF-8"):
        read_text(path)
    path.write_text(" \n")
    with pytest.raises(EvaluationError, match="holds no text"):
        read_text(path)
