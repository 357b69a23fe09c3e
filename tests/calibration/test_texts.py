"""Calibration texts: files, JSON lines, windows of them, and what is refused."""

from __future__ import annotations

import sys

import pytest
import torch

from sketchconv.calibration.texts import read_documents
from sketchconv.calibration.windows import special_tokens, text_windows
from sketchconv.errors import CalibrationError


@pytest.fixture(scope="module")
def tokenizer(llama):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(llama)


def both(text, tokenizer, counts, length=32, *, seed=0, vocabulary=260, **options):
    return text_windows(
        str(text), tokenizer, counts, length, seed=seed, vocabulary=vocabulary, **options
    )


def documents(path, tokenizer):
    return ["".join(parts) for parts in read_documents(str(path), tokenizer, 10)]


def windows(text, tokenizer, count=4, length=32, **options):
    counts = count if isinstance(count, tuple) else (count, count)
    return both(text, tokenizer, counts, length, **options).gathered


def test_json_lines_give_texts_and_rendered_chats(lines, tokenizer):
    assert documents(lines, tokenizer) == ["one two", "user: three\n"]


def test_documents_are_joined_by_the_end_of_text_token(lines, tokenizer):
    tokens = windows(lines, tokenizer, 1, 19)[0].tolist()
    assert tokenizer.decode(tokens) == "one two<eos>user: three"
    assert tokens.count(tokenizer.eos_token_id) == 1


def test_of_a_long_text_only_the_beginning_is_tokenized(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("sketchconv.calibration.windows.LEAST", 1)
    path = tmp_path / "long.txt"
    path.write_text("".join(f"{n:07d}\n" for n in range(3000)))
    drawn = [tokenizer.decode(row) for row in windows(path, tokenizer, 4, 32)]
    places = [path.read_text().index(piece) for piece in drawn]
    assert len(set(places)) == 4
    assert max(places) < 16 * 4 * 32
    assert all(place % 32 == 0 for place in places)


def test_windows_are_pieces_of_the_text_drawn_by_the_seed(text, tokenizer):
    whole = tokenizer(text.read_text())["input_ids"]
    pieces = {tuple(whole[i : i + 32]) for i in range(0, len(whole), 32)}
    first = windows(text, tokenizer)
    assert first.shape == (4, 32)
    assert first.dtype == torch.int64
    assert all(tuple(row) in pieces for row in first.tolist())
    assert torch.equal(first, windows(text, tokenizer))
    assert not torch.equal(first, windows(text, tokenizer, seed=1))
    more = both(text, tokenizer, (4, 10_000))
    assert torch.equal(more.gathered, first)
    assert len(more.short) == len(whole) // 32 - 4


def test_windows_to_recover_on_are_short_and_of_other_tokens(text, tokenizer, monkeypatch):
    monkeypatch.setattr("sketchconv.calibration.windows.SHORT", 8)
    found = both(text, tokenizer, (4, 6))
    assert found.short.shape == (8, 8)
    assert torch.equal(found.short.view(2, 32), windows(text, tokenizer, 6)[4:])
    again = both(text, tokenizer, (4, 4))  # no other tokens: the same ones
    assert torch.equal(again.short.view(4, 32), again.gathered)


def test_a_text_that_is_short_is_shared_out_if_no_count_was_asked_for(text, tokenizer):
    available = len(tokenizer(text.read_text())["input_ids"]) // 32
    asked = (2 * available, 3 * available)
    found = both(text, tokenizer, asked, strict=False)
    assert len(found.gathered) == available * 2 // 3
    assert len(found.short) == available - len(found.gathered)
    with pytest.raises(CalibrationError, match="take a longer text, or --tokens"):
        both(text, tokenizer, asked)


def test_short_windows_have_the_special_tokens_too(text, byte_tokenizer, monkeypatch):
    monkeypatch.setattr("sketchconv.calibration.windows.SHORT", 10)
    rows = both(text, framed(byte_tokenizer), (2, 4), 26).short
    assert rows.shape == (6, 10)
    assert (rows[:, [0, -1]] == 256).all()
    assert (rows[:, 1:-1] != 256).all()


def framed(byte_tokenizer):
    from tokenizers.processors import TemplateProcessing

    fast = byte_tokenizer()
    fast._tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A <eos>", special_tokens=[("<eos>", 256)]
    )
    return fast


def test_special_tokens_frame_every_window(text, byte_tokenizer):
    fast = framed(byte_tokenizer)
    assert special_tokens(fast) == ([256], [256])
    rows = windows(text, fast)
    assert (rows[:, 0] == 256).all()
    assert (rows[:, -1] == 256).all()
    assert (rows[:, 1:-1] != 256).all()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", "byte 3 is not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{oops}\n', "line 2: not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', "line 1: expected an object with a text or a messages"),
        ("a.jsonl", b'["x"]\n', "line 1: expected an object"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xc3"}', "byte 24 is not UTF-8"),
        ("a.jsonl", b'{"text":' + b"[" * 200_000, "line 1: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y \\ud83d z"}', r"line 2: \\ud83d is half of"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "u", "content": "\\ude00"}]}',
            r"line 1: \\ude00 is half of",
        ),
        ("a.txt", b"\xef\xbb\xbf" + b"x" * 3_000_000 + b"\xff", "byte 3000003 is not UTF-8"),
        ("a.jsonl", b'{"messages": [1]}\n', "line 1: the chat template refused it"),
        ("a.txt", b"short", "5 tokens, less than one window of 32"),
        ("a.txt", b"long enough for one window, but not for four of them", "1 windows of 32"),
        ("a.txt", b"", "0 tokens"),
    ],
)
def test_bad_texts_are_refused_with_the_place(tmp_path, tokenizer, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as caught:
        windows(path, tokenizer)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", b"one two"), ("a.jsonl", b'{"text": "one two"}')]
)
def test_a_byte_order_mark_is_no_text(tmp_path, tokenizer, name, content):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
    assert documents(tmp_path / name, tokenizer) == ["one two"]


def test_whole_surrogate_pairs_are_characters(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "\\ud83d\\ude00"}')
    assert documents(path, tokenizer) == ["\U0001f600"]


def test_a_long_text_is_tokenized_and_read_by_pieces(tmp_path, tokenizer, monkeypatch):
    """Peak memory does not grow with the text; the windows are those of the text at once."""
    path = tmp_path / "long.txt"
    path.write_text("".join(f"{n:07d}\r\n" for n in range(6000)), newline="")
    whole = windows(path, tokenizer, 100)
    shown = []

    def counting(text, **options):
        shown.append(len(text))
        return tokenizer(text, **options)

    monkeypatch.setattr("sketchconv.tokens.PIECE", 5000)
    monkeypatch.setattr("sketchconv.calibration.texts.PIECE", 3000)
    counting.eos_token_id = tokenizer.eos_token_id
    assert torch.equal(windows(path, counting, 100), whole)
    assert max(shown) <= 5000


def test_a_missing_file_is_not_taken_for_a_data_set(tokenizer):
    with pytest.raises(CalibrationError, match="no such file"):
        windows("nowhere/text.txt", tokenizer)


def test_a_data_set_needs_its_package(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match="pip install datasets"):
        windows("someone/something", tokenizer)


def test_messages_need_a_chat_template(lines, byte_tokenizer):
    with pytest.raises(CalibrationError, match=r"line 2: messages, but .* no chat template"):
        windows(lines, byte_tokenizer(template=False))


def test_a_tokenizer_of_another_model_is_refused(text, tokenizer):
    with pytest.raises(CalibrationError, match=r"embedding of 50 rows.*another model"):
        windows(text, tokenizer, vocabulary=50)


def test_windows_need_room_beside_special_tokens(text, tokenizer, monkeypatch):
    monkeypatch.setattr(
        "sketchconv.calibration.windows.special_tokens", lambda _tokenizer: ([1, 1], [1, 1])
    )
    with pytest.raises(CalibrationError, match="no room beside 4 special"):
        windows(text, tokenizer, 1, 4)
