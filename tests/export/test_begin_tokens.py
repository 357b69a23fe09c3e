"""Whether a GGUF file says that texts begin with the begin token, when folders say it oddly."""

from __future__ import annotations

import json

import pytest
from test_tokenizer import edit, export, fields, piece_model
from tiny import make_model, make_tokenizer

from sketchconv.errors import SourceError

BOS = "tokenizer.ggml.add_bos_token"


@pytest.fixture
def folder(tmp_path):
    """A llama with a SentencePiece tokenizer that begins texts with <s>."""
    folder = make_model(tmp_path / "model", "llama")
    make_tokenizer(folder, "spm")
    return folder


_PAD = {"direction": "Left", "pad_id": 3, "pad_type_id": 0, "pad_token": "<pad>"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("padding", {**_PAD, "strategy": {"Fixed": 64}, "pad_to_multiple_of": None}),
        ("padding", {**_PAD, "strategy": "BatchLongest", "pad_to_multiple_of": 8}),
        (
            "truncation",
            {"direction": "Left", "max_length": 1, "strategy": "LongestFirst", "stride": 0},
        ),
    ],
)
def test_padding_and_truncation_do_not_hide_the_begin_token(folder, key, value):
    edit(folder, lambda t: t.update({key: value}))
    assert fields(export(folder))[BOS] is True


def test_a_post_processor_that_hides_the_text_is_refused(folder):
    edit(folder, lambda t: t["post_processor"]["single"].pop())
    with pytest.raises(SourceError, match="where a text begins cannot be told"):
        export(folder)


def test_a_bare_piece_model_leaves_the_choice_to_the_reader_unless_it_is_set(folder):
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("a", -1.0, 1)]
    (folder / "tokenizer.model").write_bytes(piece_model(pieces))
    (folder / "tokenizer.json").unlink()
    assert BOS not in fields(export(folder))
    config = {"bos_token": "<s>", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert fields(export(folder))[BOS] is False
