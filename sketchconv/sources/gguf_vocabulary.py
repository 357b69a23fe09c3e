"""The vocabulary in a GGUF file's metadata: tokens with types and scores, merges, settings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sketchconv.errors import SourceError
from sketchconv.sources.gguf_header import (
    GgufArray,
    GgufHeader,
    GgufValue,
    read_numbers,
    read_strings,
)

UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5
_KINDS: Final = frozenset(range(7))
_PREFIX: Final = "tokenizer.ggml."


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens in the order of their ids, with their types and scores, and the settings."""

    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    settings: Mapping[str, GgufValue]
    where: str

    def setting(self, key: str, default: GgufValue | None = None) -> GgufValue | None:
        """One of the keys below `tokenizer.ggml.`."""
        return self.settings.get(_PREFIX + key, default)

    def token(self, key: str) -> str | None:
        """The token whose id is the setting `key`; None for none, or one beyond the vocabulary."""
        index = self.setting(key)
        if isinstance(index, bool) or not isinstance(index, int):
            return None
        return self.tokens[index] if 0 <= index < len(self.tokens) else None

    def ids(self) -> dict[str, int]:
        """Token to id, without the padding that fills up the embedding matrix."""
        pairs = zip(self.tokens, self.types, strict=True)
        return {token: i for i, (token, kind) in enumerate(pairs) if kind != UNUSED}

    def pairs(self) -> list[list[str]]:
        """The merges as pairs of tokens, best first.

        Raises:
            SourceError: one of them is no pair, or names what is no token.
        """
        ids = self.ids()
        found = []
        for number, merge in enumerate(self.merges):
            pair = merge.split(" ", 1)
            if len(pair) != 2 or any(part not in ids for part in (*pair, "".join(pair))):
                raise SourceError(
                    f"{self.where}: merge {number} of tokenizer.ggml.merges is {merge!r}; expected"
                    " two tokens whose union is a token"
                )
            found.append(pair)
        return found


def read_vocabulary(path: Path, header: GgufHeader) -> Vocabulary:
    """Read the arrays below `tokenizer.ggml.`.

    Raises:
        SourceError: there are none, they do not fit together, or a token is there twice.
    """

    def array(key: str) -> GgufArray | None:
        value = header.values.get(_PREFIX + key)
        if value is not None and not isinstance(value, GgufArray):
            raise SourceError(f"{path.name}: {_PREFIX}{key} is {value!r}; expected an array")
        return value

    tokens, types, scores, merges = (array(k) for k in ("tokens", "token_type", "scores", "merges"))
    if tokens is None:
        raise SourceError(f"{path.name}: no tokenizer in the metadata (tokenizer.ggml.tokens)")
    texts = read_strings(path, tokens)
    vocabulary = Vocabulary(
        texts,
        [int(t) for t in read_numbers(path, types)] if types else [1] * len(texts),
        read_numbers(path, scores) if scores else [],
        read_strings(path, merges) if merges else [],
        header.values,
        path.name,
    )
    _check(vocabulary, header)
    return vocabulary


def _check(vocabulary: Vocabulary, header: GgufHeader) -> None:
    count, where = len(vocabulary.tokens), vocabulary.where
    scored = not vocabulary.scores or len(vocabulary.scores) == count
    if len(vocabulary.types) != count or not scored:
        raise SourceError(f"{where}: token types or scores do not match {count} tokens")
    strange = next((kind for kind in vocabulary.types if kind not in _KINDS), None)
    if strange is not None:
        raise SourceError(f"{where}: a token of the unknown type {strange}; known are 0 to 6")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is not None and count > embedding.shape[0]:
        raise SourceError(
            f"{where}: {count} tokens, but the embedding has only {embedding.shape[0]} rows"
        )
    if any(math.isnan(score) for score in vocabulary.scores):
        raise SourceError(f"{where}: tokenizer.ggml.scores has values that are no numbers")
    pairs = zip(vocabulary.tokens, vocabulary.types, strict=True)
    counts = Counter(token for token, kind in pairs if kind != UNUSED)
    twice = next((token for token, count in counts.items() if count > 1), None)
    if twice is not None:
        raise SourceError(f"{where}: the token {twice!r} is there twice")
