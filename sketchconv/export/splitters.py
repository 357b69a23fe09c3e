"""Recognise how a byte-level tokenizer splits text, by what it does to a probe text.

The vocabulary plays no part, so fine-tunes with tokens of their own are recognised too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from sketchconv.errors import SourceError
from sketchconv.export.backend import library_errors, without_vocabulary
from sketchconv.sources.gguf_splitters import SPLITTERS, Splitter

# Each piece of it is cut differently by at least two known splitters, or has been in practice.
PROBE: Final = (
    "Hello World, it's THEY'RE we'LL'd don'T  2,048 and 1234567 or 3.14\n\n  two\tlines \r\n"
    "camelCase HTMLParser x_y __init__ (a+b)*c != d/e//f -> \"quoted\" '''doc''' ... ?!?!\n"
    " 1  22   333    4444 naïve Übung ΑΒΓ привет МИР 日本語テキスト 한국어\n"
    "ไทย हिन्दी عربى ½ ² Ⅳ ٣٤ "
    "🚀🚀 👩‍👩‍👧 e-mail@host.org/path/?q=1&r=2#x   \n\n\n   tail  "
)
# Beginning with a space; letters after a contraction show whether its case matters.
SPACED: Final = " I'LLAMA x'REST 'some 'Some \u2019tis \u201cso\u201d a\u00a0b \u00a0c"


def recognise_splitter(tokenizer: Mapping[str, Any], where: str) -> str:
    """The `tokenizer.ggml.pre` of a `tokenizer.json` with byte-level BPE.

    Raises:
        SourceError: it splits like none that is known; says what to pass.
    """
    wanted = _pieces(tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer"))
    whole_words = bool(tokenizer["model"].get("ignore_merges"))
    alike = [name for name, s in SPLITTERS.items() if _splits(s) == wanted]
    for name in alike:
        if SPLITTERS[name].whole_words == whole_words:
            return name
    seen = f"; it splits as {', '.join(alike)} but treats whole words differently" if alike else ""
    raise SourceError(
        f"{where}: the tokenizer splits text in a way that is not known{seen}; if you know its name"
        f" in llama.cpp, pass --tokenizer-pre NAME; known are {', '.join(sorted(SPLITTERS))}"
    )


def _splits(splitter: Splitter) -> list[str] | None:
    return _pieces({"type": "NFC"} if splitter.compose else None, splitter.json())


def _pieces(normalizer: Any, pre_tokenizer: Any) -> list[str] | None:
    """The probes' pieces in byte-level letters; None where the tokenizer has no such parts."""
    if pre_tokenizer is None:
        return None
    tokenizer = without_vocabulary(normalizer, pre_tokenizer)
    pieces: list[str] = []
    with library_errors():
        for probe in (PROBE, SPACED):
            text = tokenizer.normalizer.normalize_str(probe) if tokenizer.normalizer else probe
            pieces += [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    return pieces


def refuse_normalizers(normalizer: Any, where: str) -> None:
    """Refuse what rewrites texts, however rarely; NFC leaves composed texts as they are.

    Raises:
        SourceError: names the normalizer.
    """
    if not normalizer:
        return
    if normalizer.get("type") == "Sequence":
        for inner in normalizer.get("normalizers") or ():
            refuse_normalizers(inner, where)
    elif normalizer.get("type") != "NFC":
        raise SourceError(
            f"{where}: the tokenizer's normalizer {normalizer.get('type')!r} changes texts, which"
            " llama.cpp does not do for this kind of vocabulary"
        )
