"""A model card on disk: our part between two comments, everything else the user's own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from sketchconv.errors import HubError

NAME: Final = "README.md"
BEGIN: Final = "<!-- sketchconv:begin (written by `sketchconv push`; your text goes outside) -->"
END: Final = "<!-- sketchconv:end -->"
_BEGIN: Final = re.compile(r"<!-- sketchconv:begin\b[^>]*-->")
_SECTION: Final = re.compile(r"<!-- sketchconv:section ([\w.-]+) -->\n")
_FRONT: Final = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_TAGS: Final = re.compile(r"^tags:[^\n]*\n?(?:[ \t-][^\n]*\n?|\r?\n)*", re.MULTILINE)


def merge_card(
    existing: bytes | None,
    title: str,
    metadata: Mapping[str, Any],
    sections: Mapping[str, str],
    kept: frozenset[str] = frozenset(),
) -> bytes:
    """Write our part into a card.

    Keys that the existing card has keep their values, but our tags are added to its tags; its text
    outside of our markers is not touched. A new card gets a title.

    Args:
        existing: the card as it is, None without one.
        title: of a new card.
        metadata: YAML keys to add.
        sections: name -> Markdown, in order.
        kept: names of sections that stay from before, if they are not written anew.

    Raises:
        HubError: the card is not UTF-8, its YAML is broken, or only one of our markers is left.
    """
    text = _decoded(existing)
    front, body = _split(text)
    if existing is None:
        body = f"\n# {title}\n"
    before, ours, after = _parts(body)
    old = {name: part for name, part in _sections(ours).items() if name in kept}
    parts = [
        f"<!-- sketchconv:section {name} -->\n{part.strip()}\n"
        for name, part in {**old, **sections}.items()
    ]
    block = "\n".join([BEGIN, *parts, END])
    joint = "" if ours or not before else "\n" if before.endswith("\n") else "\n\n"
    return f"---\n{_merged(front, metadata)}---\n{before}{joint}{block}{after or chr(10)}".encode()


def section_names(existing: bytes | None) -> frozenset[str]:
    """The names of our sections in a card."""
    return frozenset(_sections(_parts(_split(_decoded(existing))[1])[1]))


def _decoded(existing: bytes | None) -> str:
    try:
        return (existing or b"").decode("utf-8")
    except UnicodeDecodeError:
        raise HubError(
            f"{NAME} of the repository is not UTF-8, so it cannot be merged; use --no-card"
        ) from None


def _split(text: str) -> tuple[str, str]:
    found = _FRONT.match(text)
    return (found[1], text[found.end() :]) if found else ("", text)


def _parts(body: str) -> tuple[str, str, str]:
    """What stands before our block, the block, and what stands after it."""
    begins, ends = list(_BEGIN.finditer(body)), body.count(END)
    if not begins and not ends:
        return body, "", ""
    if len(begins) != 1 or ends != 1 or body.index(END) < begins[0].end():
        raise HubError(
            f"{NAME} of the repository has {len(begins)} begin and {ends} end markers of "
            "sketchconv, expected one pair in order; repair it there, or use --no-card"
        )
    start, stop = begins[0].start(), body.index(END) + len(END)
    return body[:start], body[start:stop], body[stop:]


def _sections(ours: str) -> dict[str, str]:
    inner = ours.removesuffix(END)
    found = list(_SECTION.finditer(inner))
    stops = [match.start() for match in found[1:]] + [len(inner)] * bool(found)
    return {m[1]: inner[m.end() : stop] for m, stop in zip(found, stops, strict=True)}


def _merged(front: str, metadata: Mapping[str, Any]) -> str:
    """The user's YAML as it is, with our missing keys below it."""
    import yaml

    there = _parsed(front)
    tags = there.get("tags")
    ours = list(metadata.get("tags", ()))
    wanted = {**metadata, **there}
    if isinstance(tags, list):
        wanted["tags"] = [*tags, *(tag for tag in ours if tag not in tags)]
    missing = {key: value for key, value in metadata.items() if key not in there}
    text = front if not front or front.endswith("\n") else front + "\n"
    if wanted.get("tags") != tags and tags is not None:
        text = _TAGS.sub("", text, count=1)
        missing["tags"] = wanted["tags"]
    if missing:
        text += str(yaml.safe_dump(missing, sort_keys=False, allow_unicode=True))
    # A form that lines cannot add to, such as `{a: 1}`, is written anew.
    if _parsed(text, strict=False) == wanted:
        return text
    return str(yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True))


def _parsed(front: str, *, strict: bool = True) -> dict[str, Any]:
    import yaml

    try:
        value = yaml.safe_load(front)
    except (yaml.YAMLError, RecursionError, ValueError):
        value = front  # no mapping
    if isinstance(value, dict):
        return value
    if value is None or not strict:  # empty, or nothing but comments
        return {}
    raise HubError(
        f"{NAME} of the repository: its metadata is no YAML mapping; repair it, or use --no-card"
    )
