"""Token ids of a long text, as many as are needed and no more."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What some editors write at the start of a file; it is no part of the text.
BYTE_ORDER_MARK = "\ufeff"
# Characters that are tokenized at once: a tokenizer needs hundreds of bytes for each token.
PIECE = 1 << 20
# Characters that are tokenized first per token that is wanted; a token has about four.
_CHARACTERS = 6
# Tokens next to where a text is cut may be others than in the whole text.
_MARGIN = 64
_BREAKS = ("\n\n", "\n", " ")
# Ids behind a seam that must be the same in both pieces.
_ALIKE = 16
_HALVES = re.compile("[\ud800-\udfff]")


def half_character(text: str) -> str | None:
    """What is wrong with a text that holds half a surrogate pair, as JSON can; else None."""
    found = _HALVES.search(text)
    if found is None:
        return None
    return (
        f"\\u{ord(found[0]):04x} is half of a surrogate pair, which is no character; "
        "repair the text or leave it out"
    )


def first_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str | Iterable[str], wanted: int | None
) -> array[int]:
    """The first token ids of a text, int32 and without special tokens.

    A longer text is cut behind a paragraph, as far as `wanted` tokens and a margin reach; where
    that has too few the cut moves on. What is near the cut is left out, so that the ids are those
    of the whole text.

    Args:
        tokenizer: the model's.
        text: as long as it may be; or its parts, of which no more are taken than are needed.
        wanted: how many at least, if the text has them; None takes all.
    """
    ahead = _Ahead((text,) if isinstance(text, str) else text)
    size = PIECE if wanted is None else min(PIECE, _CHARACTERS * (wanted + _MARGIN))
    while True:
        part, last = ahead.look(size)
        if last:
            return array("i", _encoded(tokenizer, part)[0])
        if size == PIECE:
            return _by_pieces(tokenizer, ahead, wanted)
        found = _encoded(tokenizer, part)[0]
        if len(found) - _MARGIN >= (wanted or 0):
            return array("i", found[: len(found) - _MARGIN])
        size = min(PIECE, 2 * size)


class _Ahead:
    """A text from some place on, of which only as much is read as is looked at."""

    def __init__(self, parts: Iterable[str]) -> None:
        self._parts = iter(parts)
        self._text, self._begin = "", 0

    def look(self, size: int) -> tuple[str, bool]:
        """The next characters, at most `size` and up to a paragraph's end; whether that is all."""
        while len(self._text) - self._begin <= size:
            part = next(self._parts, None)
            if part is None:
                return self._text[self._begin :], True
            self._text, self._begin = self._text[self._begin :] + part, 0
        near = self._text[self._begin : self._begin + size]
        return near[: _paragraph_end(near)], False

    def skip(self, characters: int) -> None:
        """Go on behind the next characters."""
        self._begin += characters


@dataclass(frozen=True, slots=True)
class _Seam:
    """A place where one piece of a text may end and the next go on.

    Attributes:
        kept: ids before it, of all that were found.
        place: its character, in the next piece.
        ids: the first ones behind it.
    """

    kept: int
    place: int
    ids: list[int]


def _by_pieces(tokenizer: PreTrainedTokenizerBase, ahead: _Ahead, wanted: int | None) -> array[int]:
    """As `first_tokens`, of a text of more than one piece.

    The next piece begins a little before the end of the last one, and goes on from the first seam
    behind which both have the same ids: far from where either was cut, as in the whole text.
    """
    found: array[int] = array("i")
    seams: Sequence[_Seam] = ()
    while True:
        part, last = ahead.look(PIECE)
        ids, encoding = _encoded(tokenizer, part)
        begin = 0
        if seams:
            seam, place = _fitting(seams, ids, encoding)
            del found[seam.kept :]
            if place is None:  # a text without any borders: it is cut there
                ahead.skip(seam.place)
                seams = ()
                continue
            begin = place
        found.extend(ids[begin:])
        if last:
            return found
        if wanted is not None and len(found) - _MARGIN >= wanted:
            return found[: len(found) - _MARGIN]
        seams, step = _seams(len(found), ids, encoding, len(part))
        ahead.skip(step)
        del ids, encoding  # as large as those of the next piece


def _seams(found: int, ids: list[int], encoding: Any, length: int) -> tuple[tuple[_Seam, ...], int]:
    """Seams near the end of a piece, and where in it the next piece begins."""
    count = len(ids)
    if encoding is None or count < 8 * _MARGIN:
        return (), length
    step = _start(encoding, count - 6 * _MARGIN)
    seams = tuple(
        _Seam(found - count + n, _start(encoding, n) - step, ids[n : n + _ALIKE])
        for n in range(count - 4 * _MARGIN, count - 2 * _MARGIN)
        # Tokens that share a character have one place: then the first of them alone can be found.
        if encoding.char_to_token(_start(encoding, n)) == n
    )
    return (seams, step) if seams else ((), length)


def _fitting(seams: Sequence[_Seam], ids: list[int], encoding: Any) -> tuple[_Seam, int | None]:
    """The first seam that a piece goes on from, and the token there; else None and any seam."""
    for seam in seams:
        place = encoding.char_to_token(seam.place)
        if (
            place is not None
            and _start(encoding, place) == seam.place
            and ids[place : place + _ALIKE] == seam.ids
        ):
            return seam, place
    return seams[0], None


def _start(encoding: Any, token: int) -> int:
    """The first character of a token."""
    return int(encoding.token_to_chars(token)[0])


def _paragraph_end(text: str) -> int:
    """Behind the last paragraph, line or word of a text's second half."""
    for mark in _BREAKS:
        place = text.rfind(mark, len(text) // 2)
        if place >= 0:
            return place + len(mark)
    return len(text)


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], Any]:
    """Ids and, of tokenizers that know it, which characters each has."""
    # `verbose=False`: texts longer than a model's context are what we want here.
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)
    encodings = getattr(encoded, "encodings", None)
    return list(encoded["input_ids"]), encodings[0] if encodings else None
