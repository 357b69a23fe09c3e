"""Strict JSON: everything is bounded before it is parsed, and nothing ambiguous is accepted.

Used for the header, for the document in it, and for the index of a folder. Python's own parser
does the parsing; a scan in front of it bounds depth and count, and hooks refuse the rest.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from typing import Any, Final, NoReturn

import numpy as np

from sketchconv.formats.errors import FormatError, refuse, shown
from sketchconv.formats.rules import MAX_INTEGER

_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")
_FIXED: Final = re.compile(r"[1-9]\.[0-9]{6}e(\+[0-9]{2}|-(0[1-9]|[1-9][0-9]))|0\.000000e\+00")
_PIECE: Final = 1 << 22
_LARGE: Final = 1 << 20
_NO_BRACKET: Final = bytes(set(range(256)) - set(b"[]{}"))


class Fixed(float):
    """A JSON number in the fixed-width form of error metrics, `d.dddddde±dd`; keeps its text.

    Each value has one text: the first digit is not 0 but in `0.000000e+00`, nor is there `e-00`.
    """

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> Fixed:
        """Return the number that `text` writes."""
        self = super().__new__(cls, text)
        self.text = text
        return self

    @classmethod
    def of(cls, value: float) -> Fixed:
        """Return the metric nearest to `value`; below 1e-99 it is zero.

        Raises:
            ValueError: if `value` is negative, not finite, or 1e100 or more.
        """
        if not 0 <= value < 9.9999995e99:
            raise ValueError(f"an error metric must be in [0, 1e100), got {value!r}")
        return cls(f"{value if value >= 1e-99 else 0.0:.6e}")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a text may hold at most, and whether it may be loose about white space and numbers.

    A header has an object for each tensor, one for the metadata and the root.
    """

    depth: int
    values: int
    objects: int = 1 << 62
    whitespace: bool = False
    fixed: bool = False
    any_number: bool = False


def loads(raw: bytes, where: str, limits: Limits) -> dict[str, Any]:
    """Parse one JSON object strictly.

    Args:
        raw: UTF-8 text of one object.
        where: file and field, for the error.
        limits: depth, number of values, looseness.

    Raises:
        FormatError: SKT-006 to SKT-012 and SKT-020; nothing else, whatever the bytes are.
    """
    text = _decoded(raw, where)
    _scan(raw, where, limits)
    with collector_paused(len(raw)):
        value = _parse(text, where, limits)
    if not isinstance(value, dict):
        refuse("SKT-008", where, f"expected an object, got {type(value).__name__}")
    if _SURROGATE.search(raw):
        _check_surrogates(value, where)
    return value


@contextmanager
def collector_paused(size: int) -> Iterator[None]:
    """Pause Python's garbage collector while a text of `size` bytes, if large, is taken apart.

    A header of 200,000 tensors makes a million objects, and the collector, which finds no garbage
    among them, takes longer than the parser.
    """
    collecting = size > _LARGE and gc.isenabled()
    if collecting:
        gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def dumps(value: Any) -> str:
    """Return the canonical text: keys sorted by code point, no white space, ASCII only.

    Raises:
        TypeError: for anything but str, bool, None, int, `Fixed`, list, tuple and dict.
        ValueError: for an integer that is negative or beyond 2^63 - 1.
    """
    if isinstance(value, str):
        return encode_basestring_ascii(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        if not 0 <= value <= MAX_INTEGER:
            raise ValueError(f"an integer must be in [0, 2^63), got {value}")
        return str(value)
    if isinstance(value, Fixed):
        return value.text
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(dumps, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{_key(k)}:{dumps(value[k])}" for k in sorted(value)) + "}"
    raise TypeError(f"{type(value).__name__} has no canonical form: {shown(value)}")


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"a key must be a string, got {shown(key)}")
    return encode_basestring_ascii(key)


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        refuse("SKT-006", where, f"not UTF-8: {error.reason} at byte {error.start}")


def _scan(raw: bytes, where: str, limits: Limits) -> None:
    """Bound depth, values and objects, and refuse white space, before anything is parsed.

    Works in pieces, so that it takes about one copy of the text and nothing per value.
    """
    if not limits.whitespace:
        tail = raw[raw.rfind(b"}") + 1 :]
        if tail.strip(b" "):
            refuse("SKT-007", where, f"after the header only spaces may follow, got {raw[-1]:#04x}")
        raw = raw[: len(raw) - len(tail)]
    # Without pairs of backslashes and escaped quotes, every quote opens or closes a string.
    flat = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    inside, depth, values, objects = 0, 0, 0, 0
    for begin in range(0, len(flat), _PIECE):
        piece = np.frombuffer(flat[begin : begin + _PIECE], np.uint8)
        quote = piece == ord('"')
        parity = (np.cumsum(quote, dtype=np.uint8) + np.uint8(inside)) & np.uint8(1)
        bare = piece[(parity == 0) & ~quote].tobytes()
        inside = int(parity[-1])
        if not limits.whitespace and any(bare.count(c) for c in b" \t\n\r"):
            refuse("SKT-007", where, "white space between the tokens")
        objects += bare.count(b"{")
        values += bare.count(b",") + bare.count(b"[") + bare.count(b"{")
        if objects > limits.objects:
            refuse("SKT-020", where, f"at most {limits.objects - 2} tensors, got more")
        if values > limits.values:
            refuse("SKT-012", where, f"at most {limits.values} values, got more")
        depth = _deepen(bare, depth, where, limits)


def _deepen(bare: bytes, depth: int, where: str, limits: Limits) -> int:
    """Return the depth after a piece that holds no strings."""
    brackets = np.frombuffer(bare.translate(None, _NO_BRACKET), np.uint8)
    opening = (brackets == ord("[")) | (brackets == ord("{"))
    levels = np.cumsum(np.where(opening, np.int8(1), np.int8(-1)), dtype=np.int64) + depth
    if levels.size and int(levels.max()) > limits.depth:
        refuse("SKT-012", where, f"at most {limits.depth} levels, got {int(levels.max())}")
    return int(levels[-1]) if levels.size else depth


def _parse(text: str, where: str, limits: Limits) -> Any:
    try:
        return json.loads(
            text,
            object_pairs_hook=_pairs_hook(where),
            parse_int=_int_hook(where, limits),
            parse_float=_float_hook(where, limits),
            parse_constant=_constant_hook(where),
        )
    except json.JSONDecodeError as error:
        refuse("SKT-008", where, f"not JSON: {error.msg} at character {error.pos}")
    except RecursionError:
        refuse("SKT-012", where, "nested too deeply")


def _pairs_hook(where: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def hook(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            refuse("SKT-009", where, f"key {shown(twice)} occurs twice")
        return out

    return hook


def _int_hook(where: str, limits: Limits) -> Callable[[str], int | float]:
    def hook(digits: str) -> int | float:
        if len(digits) <= 19 and (digits[0] != "-" or limits.any_number):
            value = int(digits)
            if value <= MAX_INTEGER:
                return value
        if limits.any_number:
            return float(digits)
        return refuse("SKT-010", where, f"expected plain digits below 2^63, got {shown(digits)}")

    return hook


def _float_hook(where: str, limits: Limits) -> Callable[[str], float]:
    def hook(digits: str) -> float:
        if limits.any_number:
            return float(digits)
        if limits.fixed and _FIXED.fullmatch(digits):
            return Fixed(digits)
        return refuse("SKT-010", where, f"expected plain digits, got {shown(digits)}")

    return hook


def _constant_hook(where: str) -> Callable[[str], NoReturn]:
    def hook(name: str) -> NoReturn:
        refuse("SKT-008", where, f"{name} is not JSON")

    return hook


def _check_surrogates(value: Any, where: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise FormatError("SKT-011", where, "a string holds a lone surrogate") from None
