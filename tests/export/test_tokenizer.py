"""Tokenizers: llama.cpp cuts texts as the model's own tokenizer does; what it cannot is refused."""

from __future__ import annotations

import json
import random
import struct

import gguf
import pytest
from tiny import SPECIAL, VOCABULARY, make_model, make_tokenizer

from sketchconv.errors import SourceError
from sketchconv.export.recipe import ExportRecipe
from sketchconv.export.run import export_gguf
from sketchconv.export.sentencepiece import json_space_prefix, read_piece_model
from sketchconv.export.splitters import recognise_splitter
from sketchconv.sources.gguf_splitters import SPLITTERS

TEXTS = 500
# Composed characters only: llama.cpp never normalizes, where Qwen's tokenizers compose (NFC).
ATOMS = (
    *("the", " the", "  ", "   ", " ", "\n", "\n\n", "\t", "\r\n", "don't", "I'LL", "we'Ve", "'s"),
    *("123", "4567", "3.14", "1,000", "x", "_", "__init__", "camelCase", "HTTPServer", "naïve"),
    *("Übung", "привет", " МИР", "日本", "語テ", "한국어", "ไทย", "🚀", "!?", "...", "((", "))"),
    *(" =", " ==", "//", "**", '"', "'", "``", "-", "--", "é", "½", "²", "Ⅳ", "٣", "\u00a0"),
    *("\u3000", "\u200b", "a", "b", "C", "Z9", "9z", "@", "#1", "$", "fi", "<", "|>", "s>", "ａ"),
)


def texts(count=TEXTS):
    chosen = random.Random(0)
    return ["".join(chosen.choices(ATOMS, k=chosen.randint(1, 14))) for _ in range(count)]


@pytest.fixture
def folder(tmp_path):
    """A llama with a GPT-2 tokenizer, to change."""
    return make_model(tmp_path / "model", "llama")


def export(folder, **recipe):
    path = folder.parent / "out.gguf"
    export_gguf(folder, path, ExportRecipe("F16", **recipe), force=True)
    return path


def fields(path):
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}


@pytest.mark.parametrize("kind", ["spm", *SPLITTERS])
def test_texts_are_cut_alike(folder, kind):
    pytest.importorskip("xllamacpp")
    from peer import Runtime
    from tokenizers import Tokenizer

    make_tokenizer(folder, kind)
    runtime = Runtime(export(folder))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in texts():
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        assert runtime.tokens(text) == expected, repr(text)
    framed = tokenizer.encode("the fox").ids
    assert runtime.tokens("the fox", special=True) == framed
    if kind == "spm":
        assert framed[0] == SPECIAL.index("<s>")


@pytest.mark.parametrize("kind", SPLITTERS)
def test_splitters_are_recognised_by_what_they_do(folder, kind):
    make_tokenizer(folder, kind)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    found = recognise_splitter(tokenizer, "here")
    # Two names for one and the same behaviour.
    assert found == kind or {found, kind} == {"qwen2", "deepseek-r1-qwen"}


def test_an_unknown_splitter_is_refused_before_any_work_unless_it_is_named(folder):
    edit(folder, lambda t: t.update(pre_tokenizer={"type": "Whitespace"}))
    with pytest.raises(SourceError, match="pass --tokenizer-pre NAME; known are"):
        export(folder)
    assert [p.name for p in folder.parent.iterdir()] == ["model"]
    assert fields(export(folder, tokenizer_pre="gpt-2"))["tokenizer.ggml.pre"] == "gpt-2"


def test_the_same_pieces_but_other_treatment_of_whole_words_is_unknown(folder):
    edit(folder, lambda t: t["model"].update(ignore_merges=True))
    with pytest.raises(SourceError, match="splits as gpt-2 but treats whole words differently"):
        export(folder)


def test_special_tokens_padding_and_templates(folder):
    template = "{% for m in messages %}{{ m['content'] }}{{ raise_exception('never run') }}"
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": True}
    config["chat_template"] = [
        {"name": "default", "template": template},
        {"name": "tool_use", "template": "{{ tools }}"},
    ]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    found = fields(export(folder))
    assert found["tokenizer.ggml.bos_token_id"] == 1
    assert found["tokenizer.ggml.eos_token_id"] == 2
    assert found["tokenizer.ggml.padding_token_id"] == 3  # from the model's config
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.add_eos_token"] is False
    assert found["tokenizer.chat_template"] == template
    assert found["tokenizer.chat_templates"] == ["tool_use"]
    assert found["tokenizer.chat_template.tool_use"] == "{{ tools }}"
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == VOCABULARY
    assert tokens[:4] == list(SPECIAL)
    assert kinds[:4] == [3] * 4
    assert tokens[-1] == f"[PAD{VOCABULARY - 1}]"
    assert kinds[-1] == 5


def test_a_template_file_wins_and_is_copied_verbatim(folder):
    text = "{{ bos_token }}\r\n  {%- if x -%}ü{%- endif -%}\n\n"
    (folder / "chat_template.jinja").write_bytes(text.encode())
    assert fields(export(folder))["tokenizer.chat_template"] == text


def test_added_tokens_keep_their_kind_and_those_beyond_the_embedding_are_left_out(folder):
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    more = [
        {"id": 380, "content": "<tool_call>", "special": False, **plain},
        {"id": VOCABULARY, "content": "<image>", "special": True, **plain},
    ]
    edit(folder, lambda t: t["added_tokens"].extend(more))
    path = folder.parent / "out.gguf"
    report = export_gguf(folder, path, ExportRecipe("F16"))
    found = fields(path)
    assert found["tokenizer.ggml.tokens"][380] == "<tool_call>"
    assert found["tokenizer.ggml.token_type"][380] == 4
    assert any("1 added tokens beyond" in note and "<image>" in note for note in report.notes)


def test_a_vocabulary_beyond_the_embedding_is_refused(folder):
    edit(folder, lambda t: t["model"]["vocab"].update({"zzz": 5000}))
    with pytest.raises(SourceError, match="'zzz' has the id 5000, but the embedding has only 384"):
        export(folder)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json and no tokenizer.model"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "tokenizer.json").write_text("[]"), "expected a JSON object"),
        (lambda f: edit(f, lambda t: t["model"].update(type="WordPiece")), "type 'WordPiece'"),
        (lambda f: edit(f, lambda t: t["model"].update(vocab=[])), "no vocabulary or no merges"),
        (lambda f: edit(f, lambda t: t["model"].update(vocab={"a": "b"})), "files are broken"),
        (lambda f: edit(f, lambda t: t.update(pre_tokenizer={"type": "?"})), "tokenizer.json: "),
        (lambda f: edit(f, lambda t: t.update(added_tokens=[{"id": 1}])), "files are broken"),
    ],
)
def test_broken_or_missing_tokenizers_are_refused(folder, change, text):
    change(folder)
    with pytest.raises(SourceError, match=text):
        export(folder)
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_a_sentence_piece_vocabulary_that_lacks_merges_is_refused(folder):
    make_tokenizer(folder, "spm")
    edit(folder, lambda t: t["model"].update(merges=t["model"]["merges"][:5]))
    with pytest.raises(SourceError, match=r"lacks .* merges .* give the folder's tokenizer\.model"):
        export(folder)


def test_a_sentence_piece_tokenizer_that_rewrites_text_is_refused(folder):
    make_tokenizer(folder, "spm")
    edit(folder, lambda t: t["normalizer"]["normalizers"].insert(0, {"type": "NFKC"}))
    with pytest.raises(SourceError, match="normalizer changes texts"):
        export(folder)


_TO_LOW_LINE = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
_META = {"type": "Metaspace", "replacement": "\u2581", "split": False}


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "prefix"),
    [
        (None, {**_META, "prepend_scheme": "first"}, True),
        (None, {**_META, "prepend_scheme": "never"}, False),
        (
            _TO_LOW_LINE,
            {
                "type": "Split",
                "pattern": {"String": " "},
                "behavior": "MergedWithPrevious",
                "invert": False,
            },
            False,
        ),
        (
            {
                "type": "Sequence",
                "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, _TO_LOW_LINE],
            },
            None,
            True,
        ),
    ],
)
def test_the_space_before_a_text_is_found_in_every_way_of_writing_it(
    normalizer, pre_tokenizer, prefix
):
    tokenizer = {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer}
    assert json_space_prefix(tokenizer, "here") is prefix


def test_a_tokenizer_model_gives_the_same_vocabulary_as_the_json_made_of_it(folder):
    make_tokenizer(folder, "spm")
    by_json = fields(export(folder))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    scores = by_json["tokenizer.ggml.scores"]
    kinds = dict.fromkeys(SPECIAL, 3) | {"<unk>": 2}
    pieces = [
        (token, scores[index], kinds.get(token, 6 if token.startswith("<0x") else 1))
        for token, index in sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    ]
    (folder / "tokenizer.model").write_bytes(piece_model(pieces))
    by_model = fields(export(folder))
    for key in ("tokens", "token_type", "scores", "add_space_prefix", "bos_token_id"):
        assert by_model[f"tokenizer.ggml.{key}"] == by_json[f"tokenizer.ggml.{key}"], key


def test_piece_models_are_read_with_their_settings():
    data = piece_model([("<unk>", 0.0, 2), ("▁a", -1.5, 1)], prefix=False)
    model = read_piece_model(data, "here")
    assert model.pieces == (("<unk>", 0.0, 2), ("▁a", -1.5, 1))
    assert model.algorithm == 2
    assert not model.space_prefix


@pytest.mark.parametrize("cut", [1, 3, 9, 17])
def test_piece_models_that_are_cut_off_are_refused(cut):
    data = piece_model([("<unk>", 0.0, 2), ("▁abcdefgh", -1.5, 1)])
    with pytest.raises(SourceError, match="SentencePiece model"):
        read_piece_model(data[:cut], "here")


@pytest.mark.parametrize("data", [b"", b"\xff" * 40, b"version https://git-lfs", b"\x0b\x00"])
def test_other_files_are_no_piece_models(data):
    with pytest.raises(SourceError, match="SentencePiece model"):
        read_piece_model(data, "here")


def test_unigram_models_are_refused(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(piece_model([("a", 0.0, 1)], algorithm=1))
    with pytest.raises(SourceError, match="unigram"):
        export(folder)


def edit(folder, change):
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def piece_model(pieces, *, algorithm=2, prefix=True):
    """SentencePiece's ModelProto: field 1 pieces, 2 trainer (3: type), 3 normalizer.

    The normalizer: 3 prefix, and 4, extra spaces, which are kept, as in Llama's.
    """

    def field(number, data):
        return bytes([number << 3 | 2, *_length(len(data))]) + data

    body = b""
    for text, score, kind in pieces:
        piece = field(1, text.encode()) + b"\x15" + struct.pack("<f", score)
        body += field(1, piece + bytes([0x18, kind]))
    return body + field(2, bytes([0x18, algorithm])) + field(3, bytes([0x18, int(prefix), 0x20, 0]))


def _length(value):
    return [value] if value < 128 else [value & 127 | 128, value >> 7]
