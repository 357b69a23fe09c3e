"""From GGUF metadata to the tokenizer files of transformers.

Written directly rather than through a converter that ignores `tokenizer.ggml.pre`: how text is
split before the merges decides which tokens come out, so an unknown splitter is refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

from sketchconv.errors import SourceError
from sketchconv.sources.config import dump_json
from sketchconv.sources.gguf_header import GgufArray, GgufHeader, read_strings
from sketchconv.sources.gguf_splitters import SPLITTERS
from sketchconv.sources.gguf_vocabulary import (
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
    read_vocabulary,
)

_SPACE: Final = "\u2581"
# Every cut of a token into two is tried; real ones have dozens of characters.
_MAX_TOKEN: Final = 1024
_NAME: Final = re.compile(r"[\w-]{1,64}", re.ASCII)


def tokenizer_files(path: Path, header: GgufHeader) -> dict[str, bytes]:
    """`tokenizer.json`, `tokenizer_config.json` and chat templates (verbatim, if there).

    Raises:
        SourceError: no tokenizer, or one of a kind or with a splitter that is not known.
    """
    vocabulary = read_vocabulary(path, header)
    kind = vocabulary.setting("model")
    if kind == "gpt2":
        tokenizer = _byte_level(vocabulary)
    elif kind == "llama":
        tokenizer = _sentence_piece(vocabulary)
    else:
        raise SourceError(
            f"{path.name}: tokenizer.ggml.model is {kind!r}; supported are 'gpt2' and 'llama'"
        )
    return {
        "tokenizer.json": dump_json(tokenizer),
        "tokenizer_config.json": dump_json(_tokenizer_config(vocabulary, header)),
        **_templates(path, header),
    }


def _templates(path: Path, header: GgufHeader) -> dict[str, bytes]:
    """Chat templates, verbatim: the default one, and others by name."""
    files = {}
    template = header.values.get("tokenizer.chat_template")
    if isinstance(template, str):
        files["chat_template.jinja"] = template.encode()
    named = header.values.get("tokenizer.chat_templates")
    for name in read_strings(path, named) if isinstance(named, GgufArray) else ():
        text = header.values.get(f"tokenizer.chat_template.{name}")
        # Names become those of files.
        if _NAME.fullmatch(name) is None or not isinstance(text, str):
            raise SourceError(
                f"{path.name}: tokenizer.chat_templates names {name!r}, which has no text or is no"
                " plain name"
            )
        files[f"additional_chat_templates/{name}.jinja"] = text.encode()
    return files


def _byte_level(vocabulary: Vocabulary) -> dict[str, Any]:
    name = vocabulary.setting("pre")
    if not isinstance(name, str) or name not in SPLITTERS:
        raise SourceError(
            f"{vocabulary.where}: the text splitter tokenizer.ggml.pre = {name!r} is not known;"
            f" known are {', '.join(sorted(SPLITTERS))}; convert the Hugging Face folder instead"
        )
    splitter = SPLITTERS[name]
    model = _bpe(vocabulary.ids(), vocabulary.pairs())
    model["ignore_merges"] = splitter.whole_words
    byte_level = {"add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return {
        **_frame(vocabulary, begins=splitter.begins),
        "normalizer": {"type": "NFC"} if splitter.compose else None,
        "pre_tokenizer": splitter.json(),
        "decoder": {"type": "ByteLevel", **byte_level},
        "model": model,
    }


def _sentence_piece(vocabulary: Vocabulary) -> dict[str, Any]:
    """SentencePiece BPE, as in Llama 2: spaces become U+2581, unknown text becomes bytes."""
    if not vocabulary.scores:
        raise SourceError(f"{vocabulary.where}: no tokenizer.ggml.scores")
    ids = vocabulary.ids()
    longest = max(ids, key=len, default="")
    if len(longest) > _MAX_TOKEN:
        raise SourceError(
            f"{vocabulary.where}: a token of {len(longest)} characters; at most {_MAX_TOKEN}"
        )
    merges = merges_from_scores(list(ids), [vocabulary.scores[i] for i in ids.values()])
    model = _bpe(ids, merges)
    unknown = [
        t for t, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == UNKNOWN
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


def _frame(vocabulary: Vocabulary, *, begins: bool) -> dict[str, Any]:
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


def _added_tokens(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    special = {UNKNOWN: True, CONTROL: True, USER_DEFINED: False}
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


def _template(vocabulary: Vocabulary, *, begins: bool) -> dict[str, Any] | None:
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


def _tokenizer_config(vocabulary: Vocabulary, header: GgufHeader) -> dict[str, Any]:
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
        ("sep_token", "seperator_token_id"),  # spelt so in GGUF
        ("cls_token", "cls_token_id"),
        ("mask_token", "mask_token_id"),
    ):
        token = vocabulary.token(key)
        if token is not None:
            config[name] = token
    return config
