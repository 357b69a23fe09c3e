"""A model's tokenizer as GGUF keys: vocabulary, merges, special tokens, chat templates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from sketchconv.errors import SourceError
from sketchconv.export.sentencepiece import (
    PieceModel,
    fill_from_json,
    fill_from_pieces,
    json_space_prefix,
    read_piece_model,
    same_texts,
)
from sketchconv.export.special_tokens import chat_templates, special_tokens
from sketchconv.export.splitters import recognise_splitter, refuse_normalizers
from sketchconv.export.vocabulary import NORMAL, Vocabulary
from sketchconv.formats import gguf_values as v
from sketchconv.sources.config import parse_json

_PREFIX: Final = "tokenizer.ggml."
_BROKEN: Final = (
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
_FLAGS: Final = ("lstrip", "rstrip", "single_word")


@dataclass(frozen=True)
class TokenizerKeys:
    """Keys with encoded values, what kind of tokenizer they describe, hints, all tokens' texts."""

    values: Mapping[str, bytes]
    kind: str
    notes: tuple[str, ...]
    tokens: frozenset[str] = frozenset()


def tokenizer_keys(
    files: Mapping[str, bytes],
    config: Mapping[str, Any],
    size: int,
    where: str,
    pre: str | None = None,
) -> TokenizerKeys:
    """All keys of a tokenizer.

    Args:
        files: the source's side files by name.
        config: the model's config, for token ids that the tokenizer does not name.
        size: rows of the embedding; the vocabulary is padded to it.
        where: the source, for errors.
        pre: `tokenizer.ggml.pre`, in place of the one that is recognised.

    Raises:
        SourceError: no tokenizer, or one that llama.cpp would not reproduce.
    """
    try:
        return _keys(files, config, Vocabulary(size, where), pre)
    except _BROKEN as error:
        # Whatever a tokenizer's files break here is theirs, not a crash of ours.
        reason = f"{type(error).__name__}: {error}"
        raise SourceError(f"{where}: the tokenizer's files are broken ({reason})") from None


def _keys(
    files: Mapping[str, bytes], config: Mapping[str, Any], vocabulary: Vocabulary, pre: str | None
) -> TokenizerKeys:
    tokenizer = _parsed(files, "tokenizer.json")
    _refuse_parts(tokenizer, vocabulary)
    if _falls_back(tokenizer) or (not tokenizer and "tokenizer.model" in files):
        values = _sentence_piece(vocabulary, files, tokenizer, pre)
    elif tokenizer.get("model", {}).get("type") == "BPE":
        values = _byte_level(vocabulary, files, tokenizer, pre)
    else:
        raise SourceError(f"{vocabulary.where}: {_unsupported(files, tokenizer)}")
    vocabulary.check_unique()
    values.update(special_tokens(files, config, tokenizer, vocabulary))
    values.update(chat_templates(files))
    kind = "SentencePiece BPE" if f"{_PREFIX}scores" in values else "byte-level BPE"
    notes, tokens = tuple(vocabulary.notes), frozenset(vocabulary.tokens)
    return TokenizerKeys(MappingProxyType(values), kind, notes, tokens)


def _parsed(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    value = parse_json(files[name], name)
    if not isinstance(value, dict):
        raise SourceError(f"{name}: expected a JSON object, found {type(value).__name__}")
    return value


def _falls_back(tokenizer: Mapping[str, Any]) -> bool:
    model = tokenizer.get("model", {})
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def _refuse_parts(tokenizer: Mapping[str, Any], vocabulary: Vocabulary) -> None:
    """Refuse settings of a model that llama.cpp lacks; those of added tokens are worth a note."""
    model = tokenizer.get("model", {})
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise SourceError(
                f"{vocabulary.where}: the tokenizer has {key} = {model[key]!r}, which llama.cpp"
                " does not know"
            )
    added = tokenizer.get("added_tokens") or ()
    found = [str(entry["content"]) for entry in added if any(entry.get(f) for f in _FLAGS)]
    if found:
        vocabulary.notes.append(
            f"{len(found)} added tokens take the spaces beside them or stand for whole words only,"
            f" which a GGUF file cannot say: {', '.join(found[:5])}"
        )


def _unsupported(files: Mapping[str, bytes], tokenizer: Mapping[str, Any]) -> str:
    if tokenizer:
        kind = tokenizer.get("model", {}).get("type")
        return f"a tokenizer of type {kind!r} cannot be exported; supported is BPE"
    if "vocab.json" in files and "merges.txt" in files:
        return (
            "only vocab.json and merges.txt; make a tokenizer.json with"
            " `AutoTokenizer.from_pretrained(folder).save_pretrained(folder)`"
        )
    return "no tokenizer.json and no tokenizer.model, so the file could not be used; add them"


def _byte_level(
    vocabulary: Vocabulary,
    files: Mapping[str, bytes],
    tokenizer: Mapping[str, Any],
    pre: str | None,
) -> dict[str, bytes]:
    model = tokenizer["model"]
    refuse_normalizers(tokenizer.get("normalizer"), vocabulary.where)
    name = pre or recognise_splitter(tokenizer, vocabulary.where)
    if not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
        raise SourceError("tokenizer.json: no vocabulary or no merges; download it again")
    for token, index in model["vocab"].items():
        vocabulary.put(int(index), token, NORMAL)
    vocabulary.add(_added(files, tokenizer))
    return {
        f"{_PREFIX}model": v.string("gpt2"),
        f"{_PREFIX}pre": v.string(name),
        f"{_PREFIX}tokens": v.strings(vocabulary.tokens),
        f"{_PREFIX}token_type": v.int32s(vocabulary.types),
        f"{_PREFIX}merges": v.strings([_merge(merge) for merge in model["merges"]]),
    }


def _merge(merge: Any) -> str:
    """One merge as llama.cpp reads it: two parts with a space between, spaces in them as bytes."""
    if isinstance(merge, str):
        return merge
    return " ".join(str(part).replace(" ", "\u0120") for part in merge)


def _sentence_piece(
    vocabulary: Vocabulary,
    files: Mapping[str, bytes],
    tokenizer: Mapping[str, Any],
    pre: str | None,
) -> dict[str, bytes]:
    prefix = json_space_prefix(tokenizer, vocabulary.where) if _falls_back(tokenizer) else None
    model = _piece_model(vocabulary, files, tokenizer)
    if model is not None:
        fill_from_pieces(vocabulary, model)
        prefix = model.space_prefix if prefix is None else prefix
    else:
        fill_from_json(vocabulary, tokenizer)
    vocabulary.add(_added(files, tokenizer), spaces=True)
    return {
        f"{_PREFIX}model": v.string("llama"),
        f"{_PREFIX}pre": v.string(pre or "default"),
        f"{_PREFIX}tokens": v.strings(vocabulary.tokens),
        f"{_PREFIX}scores": v.float32s(vocabulary.scores),
        f"{_PREFIX}token_type": v.int32s(vocabulary.types),
        f"{_PREFIX}add_space_prefix": v.boolean(bool(prefix)),
    }


def _piece_model(
    vocabulary: Vocabulary, files: Mapping[str, bytes], tokenizer: Mapping[str, Any]
) -> PieceModel | None:
    """The `tokenizer.model`, unless there is none, or it is not that of the `tokenizer.json`."""
    if "tokenizer.model" not in files:
        return None
    model = read_piece_model(files["tokenizer.model"], "tokenizer.model")
    if not tokenizer and model.rewrites:
        raise SourceError(
            f"{vocabulary.where}: tokenizer.model changes texts: it {model.rewrites}, which"
            " llama.cpp does not do for this kind of vocabulary"
        )
    if tokenizer and not same_texts(model, tokenizer):
        vocabulary.notes.append(
            "tokenizer.model has other tokens than tokenizer.json, and was left aside"
        )
        return None
    return model


def _added(files: Mapping[str, bytes], tokenizer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Added tokens, from wherever a folder names them.

    Raises:
        SourceError: tokenizer_config.json has some that tokenizer.json gives no id, or another.
    """
    decoder = _parsed(files, "tokenizer_config.json").get("added_tokens_decoder") or {}
    named: list[Mapping[str, Any]] = [
        {**entry, "id": int(index)} for index, entry in decoder.items()
    ]
    if tokenizer:
        added = list(tokenizer.get("added_tokens") or ())
        ids = {**tokenizer["model"]["vocab"], **{e["content"]: int(e["id"]) for e in added}}
        for entry in named:
            if ids.get(entry["content"]) != entry["id"]:
                raise SourceError(
                    f"tokenizer_config.json: the added token {entry['content']!r} has the id"
                    f" {entry['id']}, in tokenizer.json {ids.get(entry['content'], 'none')}; save"
                    " the tokenizer again with `AutoTokenizer.from_pretrained(folder)"
                    ".save_pretrained(folder)`"
                )
        known = {entry["content"] for entry in added}
        return [*added, *(entry for entry in named if entry["content"] not in known)]
    if named:
        return named
    plain = _parsed(files, "added_tokens.json")
    return [{"id": index, "content": token, "special": False} for token, index in plain.items()]
