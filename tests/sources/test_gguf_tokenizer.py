"""Tokenizers rebuilt from GGUF metadata give the tokens of the tokenizer that was written."""

from __future__ import annotations

import itertools
import json

import gguf
import numpy as np
import pytest

from sketchconv.errors import SourceError
from sketchconv.sources.gguf_header import read_header
from sketchconv.sources.gguf_splitters import SPLITTERS
from sketchconv.sources.gguf_tokenizer import merges_from_scores, tokenizer_files

tokenizers = pytest.importorskip("tokenizers")

TEXTS = [
    "It's 12345 years since 1999, they'LL say",
    "  two  spaces\n\n 7 and\ttabs \r\n",
    "x=3.14; naïve café Ünïcode 漢字 🙂",
    "",
    "<s>special</s> text<tool>call",
]
SPECIAL = ["<unk>", "<s>", "</s>"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def write(path, tokens, types, *, model="gpt2", pre=None, merges=(), scores=(), **flags):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_tokenizer_model(model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if merges:
        writer.add_token_merges(merges)
    if len(scores):
        writer.add_token_scores(scores)
    for name, value in flags.items():
        getattr(writer, name)(value)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rebuild(path, folder):
    """The rebuilt tokenizer, through transformers, as a user would load it."""
    from transformers import PreTrainedTokenizerFast

    files = tokenizer_files(path, read_header(path))
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return PreTrainedTokenizerFast.from_pretrained(folder), files


def train(pre):
    """A small byte-level BPE with the given splitter, trained on text with runs of digits."""
    splitter = SPLITTERS[pre].json()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    description = json.loads(tokenizer.to_str())
    description["pre_tokenizer"] = splitter
    description["normalizer"] = {"type": "NFC"} if SPLITTERS[pre].compose else None
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(description))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    return tokenizer


@pytest.mark.parametrize("pre", sorted(SPLITTERS))
def test_byte_level_round_trip(tmp_path, pre):
    tokenizer = train(pre)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    types = [3 if token in SPECIAL else 1 for token in tokens]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    path = write(
        tmp_path / "t.gguf",
        [*tokens, "[PAD420]"],
        [*types, 5],
        pre=pre,
        merges=merges,
        add_add_bos_token=False,
        add_chat_template=TEMPLATE,
    )
    rebuilt, files = rebuild(path, tmp_path / "out")
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert rebuilt.encode(text) == ids
        if "<" not in text:
            assert rebuilt.decode(ids) == text
    assert files["chat_template.jinja"] == TEMPLATE.encode()
    assert rebuilt.chat_template == TEMPLATE
    assert "[PAD420]" not in rebuilt.get_vocab()


def test_qwen2_splits_as_transformers_does():
    from transformers.models.qwen2 import tokenization_qwen2

    assert SPLITTERS["qwen2"].pattern == tokenization_qwen2.PRETOKENIZE_REGEX


def test_smollm_keeps_digits_apart_from_spaces(tmp_path):
    pre = tokenizers.pre_tokenizers
    want = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(False)])
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    description = json.loads(tokenizer.to_str())
    description["pre_tokenizer"] = SPLITTERS["smollm"].json()
    got = tokenizers.Tokenizer.from_str(json.dumps(description)).pre_tokenizer
    assert got.pre_tokenize_str("a\n\n 12 b") == want.pre_tokenize_str("a\n\n 12 b")


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        ({"add_add_bos_token": True}, [1]),
        ({"add_add_bos_token": True, "add_add_eos_token": True}, [1, 2]),
        ({"add_add_bos_token": False}, []),
        ({}, []),
    ],
)
def test_begin_and_end_tokens(tmp_path, flags, want):
    path = write(
        tmp_path / "t.gguf",
        [*SPECIAL, "a"],
        [3, 3, 3, 1],
        pre="gpt-2",
        merges=["a a"][:0],
        add_bos_token_id=1,
        add_eos_token_id=2,
        **flags,
    )
    rebuilt, files = rebuild(path, tmp_path / "out")
    assert [i for i in rebuilt.encode("a") if i < 3] == want
    config = json.loads(files["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"]) == ("<s>", "</s>")
    assert config["model_max_length"] == 128


def test_llama3_begins_with_its_token_by_default(tmp_path):
    path = write(
        tmp_path / "t.gguf", [*SPECIAL, "a"], [3, 3, 3, 1], pre="llama-bpe", add_bos_token_id=1
    )
    assert rebuild(path, tmp_path / "out")[0].encode("a") == [1, 3]


PIECES = {"▁": -5.0, "a": -6.0, "b": -7.0, "c": -8.0, "▁a": -1.0, "ab": -2.0, "▁ab": -4.0,
          "bc": -1.5, "abc": -3.0}  # fmt: skip


def sentence_piece(text):
    """SentencePiece's BPE, written plainly: join the best-scored neighbours, leftmost first."""
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [
            (PIECES.get(a + b, -1e9), -i) for i, (a, b) in enumerate(itertools.pairwise(pieces))
        ]
        best = max(pairs, default=(-1e9, 0))
        if best[0] <= -1e9:
            return pieces
        i = -best[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


@pytest.fixture
def sentence_piece_file(tmp_path):
    data = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = [*SPECIAL, *data, *PIECES]
    types = [2, 3, 3, *[6] * 256, *[1] * len(PIECES)]
    scores = [0.0] * 259 + list(PIECES.values())
    return write(
        tmp_path / "t.gguf", tokens, types, model="llama", scores=scores, add_bos_token_id=1
    )


def test_sentence_piece(sentence_piece_file, tmp_path):
    rebuilt, _ = rebuild(sentence_piece_file, tmp_path / "out")
    for text in ("abc", "a", "cab bca", "aabbcc", "ab  ab", "bcabcab"):
        got = rebuilt.convert_ids_to_tokens(rebuilt.encode(text))
        assert got == ["<s>", *sentence_piece(text)]
        assert rebuilt.decode(rebuilt.encode(text), skip_special_tokens=True) == text


def test_sentence_piece_falls_back_to_bytes(sentence_piece_file, tmp_path):
    rebuilt, _ = rebuild(sentence_piece_file, tmp_path / "out")
    ids = rebuilt.encode("aé")
    assert rebuilt.convert_ids_to_tokens(ids) == ["<s>", "▁a", "<0xC3>", "<0xA9>"]
    assert rebuilt.decode(ids, skip_special_tokens=True) == "aé"


def test_merges_come_best_score_first():
    merges = merges_from_scores(["a", "b", "c", "ab", "bc", "abc"], [-9, -9, -9, -2, -1, -3])
    assert merges == [["b", "c"], ["a", "b"], ["a", "bc"], ["ab", "c"]]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"pre": "unheard-of"}, "'unheard-of' is not known; known are .*smollm"),
        ({"pre": None}, "tokenizer.ggml.pre = None"),
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'"),
        ({"model": "llama"}, "no tokenizer.ggml.scores"),
        ({"pre": "gpt-2", "scores": [0.0]}, "do not match 2 tokens"),
    ],
)
def test_unknown_tokenizers_are_refused(tmp_path, arguments, match):
    path = write(tmp_path / "t.gguf", ["a", "b"], [1, 1], **arguments)
    with pytest.raises(SourceError, match=match):
        tokenizer_files(path, read_header(path))


def test_no_tokenizer_at_all(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SourceError, match="no tokenizer in the metadata"):
        tokenizer_files(tmp_path / "t.gguf", read_header(tmp_path / "t.gguf"))
