"""Token ids of a long text, as many as are needed and no more."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Characters that are tokenized first per token that is wanted; a token has about four.
_CHARACTERS = 6
# Tokens next to where a text is cut may be others than in the whole text.
_MARGIN = 64
_BREAKS = ("\n\n", "\n", " ")


def first_tokens(tokenizer: PreTrainedTokenizerBase, text: str, wanted: int | None) -> list[int]:
    """The first token ids of a text, without special tokens.

    A longer text is cut behind a paragraph, as far as `wanted` tokens and a margin reach; where
    that has too few the cut moves on. What is near the cut is left out, so that the ids are those
    of the whole text.

    Args:
        tokenizer: the model's.
        text: as long as it may be.
        wanted: how many at least, if the text has them; None takes all.
    """
    length = len(text) if wanted is None else _CHARACTERS * (wanted + _MARGIN)
    while length < len(text):
        part = text[: _paragraph_end(text, length)]
        found = _ids(tokenizer, part)
        if len(found) - _MARGIN >= (wanted or 0):
            return found[: len(found) - _MARGIN]
        length *= 2
    return _ids(tokenizer, text)


def _paragraph_end(text: str, near: int) -> int:
    """Behind the last paragraph, line or word that ends before `near`."""
    for mark in _BREAKS:
        place = text.rfind(mark, near // 2, near)
        if place >= 0:
            return place + len(mark)
    return near


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # `verbose=False`: texts longer than a model's context are what we want here.
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)
    return [int(token) for token in encoded["input_ids"]]
