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
        self.tokenizer, self.shown = tokenizer, 0

    def __call__(self, text, **options):
        self.shown += len(text)
        return self.tokenizer(text, **options)


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "llama2", "bert"])
def test_the_beginning_is_that_of_the_whole(text, kind):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=kinds(text)[kind])
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert first_tokens(tokenizer, text, None) == whole
    assert first_tokens(tokenizer, text, 10 * len(whole)) == whole
    for wanted in (0, 1, 100, 777, len(whole) - 1):
        counting = Counting(tokenizer)
        found = first_tokens(counting, text, wanted)
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
    found = first_tokens(tokenizer, text, 50)
    assert found == whole[: len(found)]
    assert len(found) >= min(50, len(whole))
