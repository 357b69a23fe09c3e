"""From GGUF metadata to the tokenizer files of transformers.

Written directly rather than through a converter that ignores `tokenizer.ggml.pre`: how text is
split before the merges decides which tokens come out, so an unknown splitter is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sketchconv.errors import SourceError
from sketchconv.sources.config import dump_json
from sketchconv.sources.gguf_header import (
    GgufArray,
    GgufHeader,
    GgufValue,
    read_numbers,
    read_strings,
)
from sketchconv.sources.gguf_splitters import SPLITTERS

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5
_PREFIX = "tokenizer.ggml."
_SPACE = "\u2581"


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """Tokens in the order of their ids, with their types and scores, and the settings."""

    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    settings: Mapping[str, GgufValue]
    where: str

    def setting(self, key: str, default: GgufValue | None = None) -> GgufValue | None:
        return self.settings.get(_PREFIX + key, default)

    def token(self, key: str) -> str | None:
        """The token whose id is the setting `key`."""
        index = self.setting(key)
        if not isinstance(index, int) or not 0 <= index < len(self.tokens):
            return None
        return self.tokens[index]

    def ids(self) -> dict[str, int]:
        """Token to id, without the padding that fills up the embedding matrix."""
        pairs = zip(self.tokens, self.types, strict=True)
        return {token: i for i, (token, kind) in enumerate(pairs) if kind != _UNUSED}


def tokenizer_files(path: Path, header: GgufHeader) -> dict[str, bytes]:
    """`tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` (verbatim, if there).

    Raises:
        SourceError: no tokenizer, or one of a kind or with a splitter that is not known.
    """
    vocabulary = _read_vocabulary(path, header)
    kind = vocabulary.setting("model")
    if kind == "gpt2":
        tokenizer = _byte_level(vocabulary)
    elif kind == "llama":
        tokenizer = _sentence_piece(vocabulary)
    else:
        raise SourceError(
            f"{path.name}: tokenizer.ggml.model is {kind!r}; supported are 'gpt2' and 'llama'"
        )
    files = {
        "tokenizer.json": dump_json(tokenizer),
        "tokenizer_config.json": dump_json(_tokenizer_config(vocabulary, header)),
    }
    template = header.values.get("tokenizer.chat_template")
    if isinstance(template, str):
        files["chat_template.jinja"] = template.encode()
    return files


def _read_vocabulary(path: Path, header: GgufHeader) -> _Vocabulary:
    def array(key: str) -> GgufArray | None:
        value = header.values.get(_PREFIX + key)
        return value if isinstance(value, GgufArray) else None

    tokens, types, scores, merges = (array(k) for k in ("tokens", "token_type", "scores", "merges"))
    if tokens is None:
        raise SourceError(f"{path.name}: no tokenizer in the metadata (tokenizer.ggml.tokens)")
    texts = read_strings(path, tokens)
    vocabulary = _Vocabulary(
        texts,
        [int(t) for t in read_numbers(path, types)] if types else [1] * len(texts),
        read_numbers(path, scores) if scores else [],
        read_strings(path, merges) if merges else [],
        header.values,
        path.name,
    )
    if len(vocabulary.types) != len(texts) or (scores and len(vocabulary.scores) != len(texts)):
        raise SourceError(f"{path.name}: token types or scores do not match {len(texts)} tokens")
    return vocabulary


def _byte_level(vocabulary: _Vocabulary) -> dict[str, Any]:
    name = vocabulary.setting("pre")
    if not isinstance(name, str) or name not in SPLITTERS:
        raise SourceError(
            f"{vocabulary.where}: the text splitter tokenizer.ggml.pre = {name!r} is not known;"
            f" known are {', '.join(sorted(SPLITTERS))}; convert the Hugging Face folder instead"
        )
    splitter = SPLITTERS[name]
    model = _bpe(vocabulary.ids(), [merge.split(" ", 1) for merge in vocabulary.merges])
    model["ignore_merges"] = splitter.whole_words
    byte_level = {"add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return {
        **_frame(vocabulary, begins=splitter.begins),
        "normalizer": {"type": "NFC"} if splitter.compose else None,
        "pre_tokenizer": splitter.json(),
        "decoder": {"type": "ByteLevel", **byte_level},
        "model": model,
    }


def _sentence_piece(vocabulary: _Vocabulary) -> dict[str, Any]:
    """SentencePiece BPE, as in Llama 2: spaces become U+2581, unknown text becomes bytes."""
    if not vocabulary.scores:
        raise SourceError(f"{vocabulary.where}: no tokenizer.ggml.scores")
    model = _bpe(vocabulary.ids(), merges_from_scores(vocabulary.tokens, vocabulary.scores))
    unknown = [
        t for t, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == _UNKNOWN
    ]
    model.update(byte_fallback=True, fuse_unk=True, unk_token=unknown[0] if unknown else None)
    prefix = bool(vocabulary.setting("add_space_prefix", True))
    prepend = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    decoders = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *strip,
    ]
    return {
        **_frame(vocabulary, begins=True),
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


def _frame(vocabulary: _Vocabulary, *, begins: bool) -> dict[str, Any]:
    """What the two kinds of `tokenizer.json` have in common."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(vocabulary),
        "post_processor": _template(vocabulary, begins=begins),
    }


def merges_from_scores(tokens: list[str], scores: list[float]) -> list[list[str]]:
    """BPE merges, best first, of a SentencePiece vocabulary that only has scores.

    SentencePiece joins the neighbours whose union has the best score; as ranked merges, every
    split of a token into two tokens takes the token's rank.
    """
    ids = {token: index for index, token in enumerate(tokens)}
    found = []
    for token, index in ids.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-scores[index], index, ids[left], ids[right], left, right))
    return [[left, right] for *_, left, right in sorted(found)]


def _bpe(vocab: dict[str, int], merges: list[list[str]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        **dict.fromkeys(("dropout", "unk_token"), None),
        **dict.fromkeys(("continuing_subword_prefix", "end_of_word_suffix"), None),
        **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
        "vocab": vocab,
        "merges": merges,
    }


def _added_tokens(vocabulary: _Vocabulary) -> list[dict[str, Any]]:
    special = {_UNKNOWN: True, _CONTROL: True, _USER_DEFINED: False}
    return [
        {
            "id": index,
            "content": token,
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
            "special": special[kind],
        }
        for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind in special
    ]


def _template(vocabulary: _Vocabulary, *, begins: bool) -> dict[str, Any] | None:
    """Adds the begin and end tokens that the metadata asks for (`begins`: if it is silent)."""
    first = (
        vocabulary.token("bos_token_id") if vocabulary.setting("add_bos_token", begins) else None
    )
    last = vocabulary.token("eos_token_id") if vocabulary.setting("add_eos_token", False) else None
    if first is None and last is None:
        return None

    def sequence(name: str, kind: int) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = [{"Sequence": {"id": name, "type_id": kind}}]
        before = [{"SpecialToken": {"id": first, "type_id": kind}}] if first is not None else []
        after = [{"SpecialToken": {"id": last, "type_id": kind}}] if last is not None else []
        return [*before, *parts, *after]

    ids = vocabulary.ids()
    used = [token for token in (first, last) if token is not None]
    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": [*sequence("A", 0), *sequence("B", 1)],
        "special_tokens": {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in used},
    }


def _tokenizer_config(vocabulary: _Vocabulary, header: GgufHeader) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    architecture = header.values.get("general.architecture")
    length = header.values.get(f"{architecture}.context_length")
    if isinstance(length, int):
        config["model_max_length"] = length
    for name, key in (
        ("bos_token", "bos_token_id"),
        ("eos_token", "eos_token_id"),
        ("unk_token", "unknown_token_id"),
        ("pad_token", "padding_token_id"),
    ):
        token = vocabulary.token(key)
        if token is not None:
            config[name] = token
    return config
