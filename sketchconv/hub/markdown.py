"""Texts from files in Markdown: they must not end a table, a comment or a line."""

from __future__ import annotations

from typing import Any, Final

_MAX: Final = 400
_ESCAPES: Final = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "`": "&#96;", "\\": "&#92;"}
)


def plain(value: Any) -> str:
    r"""One line that Markdown and HTML show as it is.

    >>> plain("a|b\n<!-- x -->")
    'a&#124;b &lt;!-- x --&gt;'
    """
    text = "".join(c if c.isprintable() else " " for c in str(value))
    return " ".join(text.split())[:_MAX].translate(_ESCAPES)


def table(rows: tuple[tuple[str, str], ...]) -> list[str]:
    """A table of two columns without a head."""
    return ["| | |", "|---|---|", *(f"| {plain(k)} | {plain(v)} |" for k, v in rows)]
