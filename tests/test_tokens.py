"""Token ids of the beginning of a text are those of the whole text."""

from __future__ import annotations

import random

import pytest

from sketchconv.tokens import first_tokens


def byte_pairs(pre_tokenizer, text):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def kinds(text):
    """Tokenizers as GPT-2, Llama 3, Llama 2 (marks in place of spaces) and BERT have them."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pattern = r"[\p{L}]+| ?\p{N}{1,3}|\s*[\r\n]+|\s+(?!\S)|\s+|."
    llama3 = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bert = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    bert.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    bert.train_from_iterator(
        [text],
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False),
    )
    return {
        "gpt2": byte_pairs(gpt2, text),
        "llama3": byte_pairs(llama3, text),
        "llama2": byte_pairs(pre_tokenizers.Metaspace(split=False), text[:4000]),
        "bert": bert,
    }


@pytest.fixture(scope="module")
def text():
    generator = random.Random(4)
    words = ["".join(generator.choices("abcdefgh", k=generator.randint(1, 7))) for _ in range(200)]
    marks = (" ", " ", " ", ", ", ".\n", "\n\n", "\n \n\n", "   ", "\t", " 123 ")
    return "".join(w + generator.choice(marks) for w in generator.choices(words, k=6000))


class Counting:
    """A tokenizer that counts the characters that it is shown."""

    def __init__(self, tokenizer):
        self.tokenizer, self.shown, self.most = tokenizer, 0, 0

    def __call__(self, text, **options):
        self.shown += len(text)
        self.most = max(self.most, len(text))
        return self.tokenizer(text, **options)


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "llama2", "bert"])
def test_the_beginning_is_that_of_the_whole(text, kind):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=kinds(text)[kind])
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert first_tokens(tokenizer, text, None).tolist() == whole
    assert first_tokens(tokenizer, text, 10 * len(whole)).tolist() == whole
    for wanted in (0, 1, 100, 777, len(whole) - 1):
        counting = Counting(tokenizer)
        found = first_tokens(counting, text, wanted).tolist()
        assert len(found) >= wanted
        assert found == whole[: len(found)]
        if wanted <= 100:
            assert counting.shown < len(text) // 3


@pytest.mark.parametrize("text", ["", "a", "no-break" * 3000])
def test_texts_without_borders(text, tmp_path):
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = byte_pairs(pre_tokenizers.ByteLevel(add_prefix_space=False), "no-break")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = first_tokens(tokenizer, text, 50).tolist()
    assert found == whole[: len(found)]
    assert len(found) >= min(50, len(whole))


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "llama2", "bert"])
def test_pieces_have_the_ids_of_the_whole(text, kind, monkeypatch):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=kinds(text)[kind])
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    for piece in (5000, 7001):
        monkeypatch.setattr("sketchconv.tokens.PIECE", piece)
        counting = Counting(tokenizer)
        assert first_tokens(counting, text, None).tolist() == whole
        assert counting.most <= piece
        parts = (text[n : n + 999] for n in range(0, len(text), 999))
        assert first_tokens(tokenizer, parts, 10 * len(whole)).tolist() == whole
        found = first_tokens(tokenizer, text, len(whole) // 2).tolist()
        assert len(whole) // 2 <= len(found) < len(whole)
        assert found == whole[: len(found)]


@pytest.mark.parametrize(
    "text",
    ["no-break" * 3000, "1234567890" * 2000, "\u65e5\u672c\U0001f600" * 3000, " " * 30000],
    ids=["no-break", "digits", "bytes", "spaces"],
)
@pytest.mark.parametrize("kind", ["gpt2", "llama3"])
def test_pieces_of_texts_without_borders_lose_nothing(text, kind, monkeypatch):
    from transformers import PreTrainedTokenizerFast

    monkeypatch.setattr("sketchconv.tokens.PIECE", 4096)
    plain = kinds("no break")[kind]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain)
    found = first_tokens(tokenizer, text, None)
    spelled = "".join(plain.id_to_token(n) for n in found)
    whole = "".join(plain.id_to_token(n) for n in tokenizer(text)["input_ids"])
    assert spelled == whole


def test_no_more_of_a_text_is_read_than_is_needed(text):
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = byte_pairs(pre_tokenizers.ByteLevel(add_prefix_space=False), text)
    read = []

    def parts():
        for n in range(0, len(text), 100):
            read.append(n)
            yield text[n : n + 100]

    first_tokens(PreTrainedTokenizerFast(tokenizer_object=plain), parts(), 100)
    assert len(read) < 30


class Plain:
    """A tokenizer that does not know where its tokens come from."""

    def __call__(self, text, **options):
        return {"input_ids": [len(word) for word in text.split()]}


def test_a_tokenizer_without_places_gets_whole_paragraphs(text, monkeypatch):
    monkeypatch.setattr("sketchconv.tokens.PIECE", 5000)
    assert first_tokens(Plain(), text, None).tolist() == [len(word) for word in text.split()]
