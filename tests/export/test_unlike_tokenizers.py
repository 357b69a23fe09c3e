"""Tokenizers that llama.cpp would not reproduce are refused, or the difference is noted."""

from __future__ import annotations

import json

import pytest
from test_tokenizer import edit, piece_model
from tiny import VOCABULARY, make_tokenizer

from sketchconv.errors import SourceError
from sketchconv.export.sentencepiece import read_piece_model
from sketchconv.export.tokenizer import tokenizer_keys

META = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
SPM_PIECES = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("\u2581a", -1.0, 1)]


def keys(folder, **changes):
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return tokenizer_keys({**files, **changes}, {}, VOCABULARY, "here")


@pytest.fixture
def spm(tmp_path):
    make_tokenizer(tmp_path, "spm")
    return tmp_path


@pytest.fixture
def byte_level(tmp_path):
    make_tokenizer(tmp_path, "gpt-2")
    return tmp_path


@pytest.mark.parametrize(
    "step",
    [
        {"type": "Digits", "individual_digits": True},
        {"type": "Punctuation", "behavior": "Isolated"},
        {
            "type": "Split",
            "pattern": {"Regex": "[a-z]"},
            "behavior": "Isolated",
            "invert": False,
        },
    ],
)
def test_cuts_inside_words_are_refused_for_byte_fallback(spm, step):
    edit(spm, lambda t: t.update(pre_tokenizer=step))
    with pytest.raises(SourceError, match="cuts texts between"):
        keys(spm)


def test_cuts_at_spaces_are_taken_where_no_token_crosses_them(spm):
    edit(spm, lambda t: t.update(normalizer=None, pre_tokenizer=META))
    with pytest.raises(SourceError, match="never makes its token '\u2581\u2581"):
        keys(spm)

    def without(tokenizer):
        vocab = tokenizer["model"]["vocab"]
        crossing = [token for token in vocab if "\u2581\u2581" in token]
        for token in crossing:
            index = vocab.pop(token)
            vocab[f"~{index}"] = index
        merges = tokenizer["model"]["merges"]
        tokenizer["model"]["merges"] = [m for m in merges if "".join(m) not in crossing]

    edit(spm, without)
    assert keys(spm).kind == "SentencePiece BPE"


@pytest.mark.parametrize(
    "normalizer", [{"type": "NFC"}, {"type": "Strip", "strip_left": False, "strip_right": True}]
)
def test_normalizers_that_only_rare_texts_show_are_refused_for_byte_fallback(spm, normalizer):
    edit(spm, lambda t: t["normalizer"]["normalizers"].insert(0, normalizer))
    with pytest.raises(SourceError, match="normalizer changes texts"):
        keys(spm)


def test_a_piece_model_that_is_not_the_jsons_is_left_aside(spm, byte_level):
    stale = piece_model(SPM_PIECES)
    before = keys(byte_level)
    assert keys(byte_level, **{"tokenizer.model": stale}).values == before.values
    make_tokenizer(spm, "spm")
    plain, beside = keys(spm), keys(spm, **{"tokenizer.model": stale})
    assert beside.values == plain.values
    assert any("other tokens than tokenizer.json" in note for note in beside.notes)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (b"\x0a\x08nmt_nfkc\x20\x00", r"normalizes them \(nmt_nfkc\)"),
        (b"\x0a\x08identity\x12\x01x\x20\x00", "normalizes them"),
        (b"\x0a\x08identity\x20\x01", "removes extra spaces"),
        (b"\x0a\x08identity", "removes extra spaces"),
    ],
)
def test_piece_models_that_rewrite_texts_are_refused(tmp_path, settings, text):
    plain = piece_model(SPM_PIECES)
    begin = plain.rindex(b"\x1a\x04")
    identity = b"\x0a\x08identity\x18\x01\x20\x00"  # as Llama 2 and Mistral have it
    usual = plain[:begin] + b"\x1a" + bytes([len(identity)]) + identity
    assert read_piece_model(usual, "here").rewrites == ""
    assert keys(tmp_path, **{"tokenizer.model": usual}).kind == "SentencePiece BPE"
    data = plain[:begin] + b"\x1a" + bytes([len(settings)]) + settings
    with pytest.raises(SourceError, match=text):
        keys(tmp_path, **{"tokenizer.model": data})


@pytest.mark.parametrize(
    ("key", "value"),
    [("end_of_word_suffix", "</w>"), ("continuing_subword_prefix", "##"), ("dropout", 0.1)],
)
def test_parts_of_a_model_that_llama_cpp_lacks_are_refused(byte_level, key, value):
    edit(byte_level, lambda t: t["model"].update({key: value}))
    with pytest.raises(SourceError, match=f"{key} = {value!r}"):
        keys(byte_level)
    edit(byte_level, lambda t: t["model"].update({key: None}))
    assert keys(byte_level).kind == "byte-level BPE"


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "Strip", "strip_left": True, "strip_right": False},
        {"type": "Replace", "pattern": {"String": "zq"}, "content": "x"},
        {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]},
    ],
)
def test_normalizers_are_refused_for_byte_level(byte_level, normalizer):
    edit(byte_level, lambda t: t.update(normalizer=normalizer))
    with pytest.raises(SourceError, match=r"normalizer '[A-Z][a-z]+' changes texts"):
        keys(byte_level)


def test_contractions_that_heed_case_are_another_splitter(tmp_path):
    make_tokenizer(tmp_path, "dbrx")
    assert keys(tmp_path).kind == "byte-level BPE"

    def heed(tokenizer):
        pattern = tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]
        pattern["Regex"] = pattern["Regex"].replace("(?i:", "(?:")

    edit(tmp_path, heed)
    with pytest.raises(SourceError, match="splits text in a way that is not known"):
        keys(tmp_path)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_flags_of_added_tokens_are_noted(byte_level, flag):
    assert not keys(byte_level).notes
    edit(byte_level, lambda t: t["added_tokens"][3].update({flag: True}))
    (note,) = keys(byte_level).notes
    assert "1 added tokens take the spaces" in note
    assert "<pad>" in note


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}},
        {"added_tokens": [{"id": float("inf"), "content": "x"}]},
        {"added_tokens": [{"id": 0}]},
        {"added_tokens": [[]]},
    ],
)
@pytest.mark.parametrize("kind", ["spm", "gpt-2"])
def test_whatever_breaks_in_a_tokenizers_file_is_a_source_error(tmp_path, kind, change):
    make_tokenizer(tmp_path, kind)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(SourceError):
        keys(tmp_path)


def test_merges_of_nothing_are_a_source_error(spm):
    edit(spm, lambda t: t["model"].update(merges=[[]]))
    with pytest.raises(SourceError, match="files are broken"):
        keys(spm)


@pytest.mark.parametrize("kind", ["spm", "gpt-2"])
def test_added_tokens_that_only_the_config_knows_are_refused(tmp_path, kind):
    make_tokenizer(tmp_path, kind)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    known = {"1": {"content": "<s>", "special": True}}
    path.write_text(json.dumps({**config, "added_tokens_decoder": known}))
    assert keys(tmp_path).values
    for index, content in (("383", "<tool>"), ("2", "<s>")):
        decoder = {**known, index: {"content": content, "special": True}}
        path.write_text(json.dumps({**config, "added_tokens_decoder": decoder}))
        with pytest.raises(SourceError, match=f"'{content}' has the id {index}, in tokenizer.json"):
            keys(tmp_path)
