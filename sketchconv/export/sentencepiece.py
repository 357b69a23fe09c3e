"""SentencePiece BPE vocabularies, from `tokenizer.model` or a `tokenizer.json` made of one."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from sketchconv.errors import SourceError
from sketchconv.export.backend import library_errors, without_vocabulary
from sketchconv.export.vocabulary import BYTE, NORMAL, UNKNOWN, Vocabulary, is_byte

SPACE: Final = "\u2581"
_BPE: Final = 2
_PROBE: Final = "a  Bc é ﬁ ２ ½\u3000日本\n\tx 12 3.5,!? (y)e\u0301  "
# Share of merges that may be absent before the two tokenizers count as different.
_TOLERATED: Final = 0.01


@dataclass(frozen=True, slots=True)
class PieceModel:
    """A `tokenizer.model`: pieces with score and type, and whether a space goes before a text.

    `rewrites` names what else its normalizer does to texts; empty for none.
    """

    pieces: tuple[tuple[str, float, int], ...]
    algorithm: int
    space_prefix: bool
    rewrites: str = ""


def read_piece_model(data: bytes, where: str) -> PieceModel:
    """Read SentencePiece's ModelProto (protocol buffers, fields 1 to 3).

    Raises:
        SourceError: it is none, or is cut off.
    """
    pieces, algorithm = [], 1
    settings: dict[int, bytes | int] = {}
    try:
        for number, value in _fields(data):
            if number == 1 and isinstance(value, bytes):
                pieces.append(_piece(value))
            elif number == 2 and isinstance(value, bytes):
                algorithm = int(next((v for n, v in _fields(value) if n == 3), 1))
            elif number == 3 and isinstance(value, bytes):
                settings.update(_fields(value))
    except (ValueError, LookupError, struct.error):
        raise SourceError(f"{where}: not a SentencePiece model, or cut off") from None
    if not pieces:
        raise SourceError(f"{where}: a SentencePiece model without pieces")
    return PieceModel(tuple(pieces), algorithm, bool(settings.get(3, 1)), _rewrites(settings))


def _rewrites(settings: Mapping[int, bytes | int]) -> str:
    """What a NormalizerSpec does to texts: fields 1 name, 2 map of characters, 4 extra spaces."""
    name = settings.get(1, b"")
    if settings.get(2) or name not in (b"", b"identity"):
        shown = name.decode("utf-8", "replace") if isinstance(name, bytes) else name
        return f"normalizes them ({shown or 'a map of characters'})"
    return "removes extra spaces" if settings.get(4, 1) else ""


def _piece(data: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif number == 2 and isinstance(value, bytes):
            score = struct.unpack("<f", value)[0]
        elif number == 3 and isinstance(value, int):
            kind = value
    return text, score, kind


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Fields of one message: varints as integers, all else as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        size, at = _varint(data, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
        if at + size > len(data):
            raise ValueError("cut off")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("varint too long")


def same_texts(model: PieceModel, tokenizer: Mapping[str, Any]) -> bool:
    """Whether a `tokenizer.json` has the pieces of a `tokenizer.model` under the same ids.

    Ids of added tokens may differ: they often rename pieces without use.
    """
    vocab: Mapping[str, int] = tokenizer["model"]["vocab"]
    added = {int(entry["id"]) for entry in tokenizer.get("added_tokens") or ()}
    texts = {index: text for index, (text, _, _) in enumerate(model.pieces) if index not in added}
    return texts == {index: text for text, index in vocab.items() if index not in added}


def fill_from_pieces(vocabulary: Vocabulary, model: PieceModel) -> None:
    """Take texts, scores and types from a `tokenizer.model`.

    Raises:
        SourceError: not a BPE model.
    """
    if model.algorithm != _BPE:
        raise SourceError(
            f"{vocabulary.where}: tokenizer.model is a unigram model; only BPE can be exported"
        )
    for index, (text, score, kind) in enumerate(model.pieces):
        vocabulary.put(index, text, kind, score)


def fill_from_json(vocabulary: Vocabulary, tokenizer: Mapping[str, Any]) -> None:
    """Take a vocabulary with byte fallback from `tokenizer.json`; scores from the merges' ranks.

    llama.cpp joins the neighbours whose union has the best score. That is what ranked merges do
    if every way to cut a token in two has that token's rank, as in files made from SentencePiece.

    Raises:
        SourceError: many such merges are missing, so that other tokens would come out.
    """
    model = tokenizer["model"]
    vocab: Mapping[str, int] = model["vocab"]
    ranks: dict[str, int] = {}
    pairs = set()
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
        pairs.add((left, right))
    for token, index in vocab.items():
        kind = BYTE if is_byte(token) else NORMAL
        if token == model.get("unk_token"):
            kind = UNKNOWN
        vocabulary.put(index, token, kind, -float(ranks.get(token, len(pairs) + index)))
    added = {entry["content"] for entry in tokenizer.get("added_tokens", ())}
    _check_merges(vocabulary, vocab, ranks, pairs, added)


def _check_merges(
    vocabulary: Vocabulary,
    vocab: Mapping[str, int],
    ranks: Mapping[str, int],
    pairs: set[tuple[str, str]],
    added: set[str],
) -> None:
    missing = 0
    for token in vocab:
        if token in added or is_byte(token):
            continue
        cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
        missing += sum(
            left in vocab and right in vocab and (left, right) not in pairs for left, right in cuts
        )
    if missing > _TOLERATED * max(len(pairs), 1):
        raise SourceError(
            f"{vocabulary.where}: tokenizer.json lacks {missing:,} of the merges that llama.cpp"
            " would make with this vocabulary, so other tokens would come out; give the folder's"
            " tokenizer.model too"
        )


def json_space_prefix(tokenizer: Mapping[str, Any], where: str) -> bool:
    """Whether a space is put before a text; what else a normalizer does is refused.

    Raises:
        SourceError: the text is changed in a way that llama.cpp does not.
    """
    parsed = without_vocabulary(tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer"))
    with library_errors():
        text = parsed.normalizer.normalize_str(_PROBE) if parsed.normalizer else _PROBE
        found = parsed.pre_tokenizer.pre_tokenize_str(text) if parsed.pre_tokenizer else [(text, 0)]
    pieces = [piece for piece, _ in found]
    text = "".join(pieces)
    plain = _PROBE.replace(" ", SPACE)
    if text not in (plain, SPACE + plain):
        raise SourceError(
            f"{where}: the tokenizer's normalizer changes texts (for instance to NFKC), which"
            " llama.cpp does not do for this kind of vocabulary"
        )
    _check_cuts(pieces, tokenizer, where)
    return bool(text.startswith(SPACE))


def _check_cuts(pieces: list[str], tokenizer: Mapping[str, Any], where: str) -> None:
    """llama.cpp never cuts a text before merging: cuts must be where no token could join."""
    patterns = set()
    for left, right in pairwise(pieces):
        sides = left.endswith(SPACE), right.startswith(SPACE)
        if not any(sides):
            raise SourceError(
                f"{where}: the tokenizer cuts texts between {left[-1]!r} and {right[0]!r}, which"
                " llama.cpp does not do for this kind of vocabulary"
            )
        patterns.add("".join(SPACE if side else f"[^{SPACE}]" for side in sides))
    vocab = tokenizer.get("model", {}).get("vocab", {})
    added = {entry["content"] for entry in tokenizer.get("added_tokens") or ()}
    for pattern in sorted(patterns):
        crossing = next((t for t in vocab if t not in added and re.search(pattern, t)), None)
        if crossing is not None:
            raise SourceError(
                f"{where}: the tokenizer cuts texts at spaces and so never makes its token"
                f" {crossing!r}, but llama.cpp would"
            )
