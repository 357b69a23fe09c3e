r"""How byte-level BPE tokenizers split text before merging, by GGUF's `tokenizer.ggml.pre`.

The patterns are those that the models' own `tokenizer.json` files carry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _TAIL
_QWEN2 = _CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _TAIL
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _TAIL
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _TAIL
)


@dataclass(frozen=True, slots=True)
class Splitter:
    """One way to split.

    Attributes:
        pattern: a regular expression for the pieces; None for GPT-2's own.
        digits: every digit is a piece of its own, before all else.
        compose: text is first brought to Unicode's composed form (NFC).
        whole_words: a piece that is a token needs no merges.
        begins: texts begin with the begin token unless the file says otherwise.
    """

    pattern: str | None = None
    digits: bool = False
    compose: bool = False
    whole_words: bool = False
    begins: bool = False

    def json(self) -> dict[str, Any]:
        """The `pre_tokenizer` entry of `tokenizer.json`."""
        steps: list[dict[str, Any]] = []
        if self.digits:
            steps.append({"type": "Digits", "individual_digits": True})
        if self.pattern is not None:
            split = {"pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
            steps.append({"type": "Split", **split})
        steps.append(
            {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": self.pattern is None,
            }
        )
        return {"type": "Sequence", "pretokenizers": steps}


SPLITTERS: Mapping[str, Splitter] = {
    "gpt-2": Splitter(),
    "smollm": Splitter(digits=True),
    "llama-bpe": Splitter(_LLAMA3, whole_words=True, begins=True),
    "qwen2": Splitter(_QWEN2, compose=True),
    "deepseek-r1-qwen": Splitter(_QWEN2, compose=True),
    "tekken": Splitter(_TEKKEN, whole_words=True, begins=True),
    "dbrx": Splitter(_LLAMA3),
    "gpt-4o": Splitter(_GPT4O),
}
