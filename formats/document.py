"""What documents of every kind share: canonical text, seal, version, digests, extensions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from sketchconv.formats import rules
from sketchconv.formats.digest import ZERO_DIGEST, text_digest
from sketchconv.formats.errors import refuse, shown
from sketchconv.formats.strict_json import Limits, dumps

LIMITS: Final = Limits(rules.MAX_DOCUMENT_DEPTH, rules.MAX_VALUES, whitespace=True, fixed=True)
_VERSION: Final = re.compile(r"(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})")
_HEX: Final = re.compile(r"[0-9a-f]{64}")
_EXTENSION: Final = re.compile(rules.EXTENSION_PATTERN)


def sealed(members: Mapping[str, str]) -> str:
    """Return the canonical text of a document with its seal (SKT-050, SKT-055).

    Args:
        members: the canonical text of each member of the root; one named `seal` is replaced.
    """
    texts = {**members, "seal": f'"{ZERO_DIGEST}"'}
    keys = sorted(texts)
    blank = "{" + ",".join(f"{dumps(k)}:{texts[k]}" for k in keys) + "}"
    texts["seal"] = f'"{text_digest(blank)}"'
    return "{" + ",".join(f"{dumps(k)}:{texts[k]}" for k in keys) + "}"


def check_seal(value: dict[str, Any], text: str, at: str) -> None:
    """Check that a document is canonical and matches its seal.

    Raises:
        FormatError: SKT-050, SKT-055.
    """
    members = {k: dumps(v) for k, v in value.items()}
    if "{" + ",".join(f"{dumps(k)}:{members[k]}" for k in sorted(members)) + "}" != text:
        refuse("SKT-050", at, "not in canonical form (key order, white space or escapes)")
    if sealed(members) != text:
        refuse("SKT-055", at, f"the seal {shown(value['seal'])} does not match the document")


def major_of(version: Any) -> int | None:
    """Return the major part of a version `MAJOR.MINOR`; None for anything else."""
    found = _VERSION.fullmatch(version) if isinstance(version, str) else None
    return None if found is None else int(found[1])


def is_digest(value: Any) -> bool:
    """Whether a JSON value is 64 lower-case hexadecimal digits."""
    return isinstance(value, str) and _HEX.fullmatch(value) is not None


def check_extensions(value: Any, at: str) -> None:
    """Check the member `extensions`.

    Raises:
        FormatError: SKT-057.
    """
    if not isinstance(value, dict) or not all(map(_EXTENSION.fullmatch, value)):
        refuse("SKT-057", at, f"extensions must have reversed domain names: {shown(value)}")
