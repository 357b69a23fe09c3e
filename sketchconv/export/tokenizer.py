"""A model's tokenizer as GGUF keys: vocabulary, merges, special tokens, chat templates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from sketchconv.errors import SourceError
from sketchconv.export.sentencepiece import (
    fill_from_json,
    fill_from_pieces,
    json_space_prefix,
    read_piece_model,
)
from sketchconv.export.special_tokens import chat_templates, special_tokens
from sketchconv.export.splitters import recognise_splitter
from sketchconv.export.vocabulary import NORMAL, Vocabulary
from sketchconv.formats import gguf_values as v
from sketchconv.sources.config import parse_json

_PREFIX: Final = "tokenizer.ggml."


@dataclass(frozen=True)
class TokenizerKeys:
    """Keys with encoded values, what kind of tokenizer they describe, hints for the user."""

    values: Mapping[str, bytes]
    kind: str
    notes: tuple[str, ...]


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
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        # Whatever a tokenizer's files break here is theirs, not a crash of ours.
        reason = f"{type(error).__name__}: {error}"
        raise SourceError(f"{where}: the tokenizer's files are broken ({reason})") from None


def _keys(
    files: Mapping[str, bytes], config: Mapping[str, Any], vocabulary: Vocabulary, pre: str | None
) -> TokenizerKeys:
    tokenizer = _parsed(files, "tokenizer.json")
    if "tokenizer.model" in files or _falls_back(tokenizer):
        values = _sentence_piece(vocabulary, files, tokenizer, pre)
    elif tokenizer.get("model", {}).get("type") == "BPE":
        values = _byte_level(vocabulary, tokenizer, pre)
    else:
        raise SourceError(f"{vocabulary.where}: {_unsupported(files, tokenizer)}")
    values.update(special_tokens(files, config, tokenizer, vocabulary))
    values.update(chat_templates(files))
    kind = "SentencePiece BPE" if f"{_PREFIX}scores" in values else "byte-level BPE"
    return TokenizerKeys(MappingProxyType(values), kind, tuple(vocabulary.notes))


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
    vocabulary: Vocabulary, tokenizer: Mapping[str, Any], pre: str | None
) -> dict[str, bytes]:
    model = tokenizer["model"]
    name = pre or recognise_splitter(tokenizer, vocabulary.where)
    if not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
        raise SourceError("tokenizer.json: no vocabulary or no merges; download it again")
    for token, index in model["vocab"].items():
        vocabulary.put(int(index), token, NORMAL)
    vocabulary.add(tokenizer.get("added_tokens") or ())
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
    if "tokenizer.model" in files:
        model = read_piece_model(files["tokenizer.model"], "tokenizer.model")
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


def _added(files: Mapping[str, bytes], tokenizer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Added tokens, from wherever a folder names them."""
    if tokenizer:
        return list(tokenizer.get("added_tokens") or ())
    decoder = _parsed(files, "tokenizer_config.json").get("added_tokens_decoder") or {}
    if decoder:
        return [{"id": int(index), **entry} for index, entry in decoder.items()]
    plain = _parsed(files, "added_tokens.json")
    return [{"id": index, "content": token, "special": False} for token, index in plain.items()]
