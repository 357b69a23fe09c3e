"""Begin, end, padding and other special tokens, and chat templates, as GGUF keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from sketchconv.errors import SourceError
from sketchconv.export.backend import library_errors, running_tokenizer
from sketchconv.export.vocabulary import Vocabulary
from sketchconv.formats import gguf_values as v
from sketchconv.sources.config import parse_json

_PREFIX: Final = "tokenizer.ggml."
_ROLES: Final = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # spelt so in GGUF
    "pad": "padding_token_id",
    "cls": "cls_token_id",
    "mask": "mask_token_id",
}


def special_tokens(
    files: Mapping[str, bytes],
    config: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    vocabulary: Vocabulary,
) -> dict[str, bytes]:
    """Ids of special tokens, and whether texts begin and end with them.

    A token that `tokenizer_config.json` names wins over an id in the model's config.
    """
    settings = _object(files, "tokenizer_config.json")
    tokens = {**_object(files, "special_tokens_map.json"), **settings}
    ids: dict[str, int] = {}
    for role in _ROLES:
        index = _named(tokens.get(f"{role}_token"), vocabulary)
        if index is None:
            index = _first(config.get(f"{role}_token_id"), vocabulary.size)
        if index is not None:
            ids[role] = index
    values = {f"{_PREFIX}{_ROLES[role]}": v.uint32(index) for role, index in ids.items()}
    begins, ends = _frame(tokenizer, ids)
    for role, default in (("bos", begins), ("eos", ends)):
        given = settings.get(f"add_{role}_token")
        if not tokenizer and not isinstance(given, bool):
            continue  # Nobody says: readers of a bare tokenizer.model know SentencePiece's way.
        wanted = given if isinstance(given, bool) else default
        values[f"{_PREFIX}add_{role}_token"] = v.boolean(wanted and role in ids)
    return values


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    value = parse_json(files[name], name) if name in files else {}
    return value if isinstance(value, dict) else {}


def _named(token: Any, vocabulary: Vocabulary) -> int | None:
    text = token.get("content") if isinstance(token, dict) else token
    return vocabulary.index(text) if isinstance(text, str) else None


def _first(value: Any, size: int) -> int | None:
    """An id, or the first of a list of ids, if the vocabulary has it."""
    found = value[0] if isinstance(value, list) and value else value
    usable = isinstance(found, int) and not isinstance(found, bool) and 0 <= found < size
    return found if usable else None


def _frame(tokenizer: Mapping[str, Any], ids: Mapping[str, int]) -> tuple[bool, bool]:
    """Whether the tokenizer itself puts the begin token before, and the end token after a text.

    Raises:
        SourceError: the text's own tokens are not among those with special ones.
    """
    if not tokenizer.get("post_processor"):
        return False, False
    parsed = running_tokenizer(tokenizer)
    with library_errors():
        # Those are settings of a batch, and would hide where the text begins.
        parsed.no_padding()
        parsed.no_truncation()
        framed = parsed.encode("a").ids
        bare = parsed.encode("a", add_special_tokens=False).ids
    at = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), None)
    if at is None or not bare:
        raise SourceError(
            f"tokenizer.json: 'a' becomes {framed} with special tokens and {bare} without, so where"
            " a text begins cannot be told; repair its post_processor"
        )
    before, after = framed[:at], framed[at + len(bare) :]
    return before == [ids.get("bos")], after == [ids.get("eos")]


def chat_templates(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Chat templates exactly as the files have them; nothing is ever rendered.

    Raises:
        SourceError: a template is not UTF-8.
    """
    templates = _templates(files)
    default = templates.pop("default", None)
    values = {}
    if default is not None:
        values["tokenizer.chat_template"] = v.string(default)
    if templates:
        values["tokenizer.chat_templates"] = v.strings(list(templates))
        for name, text in templates.items():
            values[f"tokenizer.chat_template.{name}"] = v.string(text)
    return values


def _templates(files: Mapping[str, bytes]) -> dict[str, str]:
    found: dict[str, str] = {}
    given = _object(files, "tokenizer_config.json").get("chat_template")
    if given is None:
        given = _object(files, "chat_template.json").get("chat_template")
    if isinstance(given, str):
        found["default"] = given
    elif isinstance(given, list):
        named = [t for t in given if isinstance(t, dict)]
        found.update((str(t.get("name")), str(t.get("template"))) for t in named)
    for path, data in files.items():
        folder, _, name = path.rpartition("/")
        if path == "chat_template.jinja":
            found["default"] = _text(data, path)
        elif folder in ("chat_templates", "additional_chat_templates") and name.endswith(".jinja"):
            found[name.removesuffix(".jinja")] = _text(data, path)
    return found


def _text(data: bytes, path: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise SourceError(f"{path}: not UTF-8; download it again") from None
