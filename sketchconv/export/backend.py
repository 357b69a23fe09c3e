"""The `tokenizers` library behind one function: from the JSON of a tokenizer to a running one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sketchconv.errors import SourceError

_OURS = (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError)


@contextmanager
def library_errors() -> Iterator[None]:
    """Within it, whatever the library raises is an error of the tokenizer's file.

    Its panics are no `Exception`, and it raises nothing narrower than that either.

    Raises:
        SourceError: says what the library said.
    """
    try:
        yield
    except _OURS:
        raise
    except BaseException as error:
        raise SourceError(f"tokenizer.json: {error}; download it again") from None


def running_tokenizer(value: Mapping[str, Any]) -> Any:
    """A `tokenizers.Tokenizer` from the content of a `tokenizer.json`.

    Raises:
        SourceError: the library does not take it.
    """
    from tokenizers import Tokenizer

    with library_errors():
        return Tokenizer.from_str(json.dumps(value))


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
