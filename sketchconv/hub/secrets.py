"""What must never be published: access tokens and private keys in text that goes along."""

from __future__ import annotations

import re
from typing import Final

_MIN_TOKEN: Final = 8
_KINDS: Final = (
    ("a Hugging Face token", rb"\b(?:hf|api_org)_[A-Za-z0-9]{30,}"),
    ("an AWS access key", rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    ("a GitHub token", rb"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{50,})"),
    ("an OpenAI or Anthropic key", rb"\bsk-(?:proj|ant|svcacct)-[A-Za-z0-9_-]{32,}"),
    ("a Slack token", rb"\bxox[abprs]-[0-9A-Za-z-]{20,}"),
    ("a Google key", rb"\bAIza[0-9A-Za-z_-]{35}\b"),
    # With some of its base64: a vocabulary may hold the head line alone.
    (
        "a private key",
        rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----(?:\s|\\r|\\n)*[A-Za-z0-9+/=]{24,}",
    ),
)
_PATTERN: Final = re.compile(b"|".join(b"(?P<k%d>%s)" % (i, p) for i, (_, p) in enumerate(_KINDS)))


def find_secret(data: bytes, token: str | None = None) -> str | None:
    """The kind and the line of the first secret in a text; never the secret itself.

    Args:
        data: of a text file, or texts from a header.
        token: the access token in use, which is looked for whatever its form.

    >>> find_secret(b"one\\ntwo AKIAIOSFODNN7EXAMPLE")
    'an AWS access key in line 2'
    """
    if token is not None and len(token) >= _MIN_TOKEN:
        at = data.find(token.encode())
        if at >= 0:
            return f"the access token in use in line {_line(data, at)}"
    found = _PATTERN.search(data)
    if found is None:
        return None
    kind = _KINDS[int(str(found.lastgroup)[1:])][0]
    return f"{kind} in line {_line(data, found.start())}"


def redact(text: str, token: str | None = None) -> str:
    """A text for people, without anything that looks like a secret."""
    if token is not None and len(token) >= _MIN_TOKEN:
        text = text.replace(token, "***")
    clean = _PATTERN.sub(b"***", text.encode("utf-8", "backslashreplace"))
    # Presigned addresses carry their right in the query.
    return re.sub(r"(https?://[^\s'\"?]+)\?[^\s'\"]*", r"\1", clean.decode())


def _line(data: bytes, at: int) -> int:
    return data.count(b"\n", 0, at) + 1
