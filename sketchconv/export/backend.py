"""The `tokenizers` library behind one function: from the JSON of a tokenizer to a running one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sketchconv.errors import SourceError


def running_tokenizer(value: Mapping[str, Any]) -> Any:
    """A `tokenizers.Tokenizer` from the content of a `tokenizer.json`.

    Raises:
        SourceError: the library does not take it.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(json.dumps(value))
    except Exception as error:
        # The library raises nothing narrower.
        raise SourceError(f"tokenizer.json: {error}; download it again") from None


def without_vocabulary(normalizer: Any, pre_tokenizer: Any) -> Any:
    """A running tokenizer that only normalizes and splits.

    Raises:
        SourceError: as `running_tokenizer`.
    """
    return running_tokenizer(
        {
            "version": "1.0",
            **dict.fromkeys(("truncation", "padding", "post_processor", "decoder"), None),
            "added_tokens": [],
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "model": {"type": "BPE", "vocab": {}, "merges": []},
        }
    )
