"""The safetensors header: strict parsing into entries, and the canonical text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from typing import Any, Final

from sketchconv.formats import rules
from sketchconv.formats.errors import FormatError, refuse, shown
from sketchconv.formats.strict_json import Limits, collector_paused, loads
from sketchconv.formats.tensors import DTYPES, SKTCH_DTYPES, TensorInfo

METADATA: Final = "__metadata__"
_FIELDS: Final = frozenset({"dtype", "shape", "data_offsets"})


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: its description, and its absolute byte range `[begin, end)`."""

    info: TensorInfo
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Profile:
    """How strict a container is: the `.sktch` profile, or any valid foreign safetensors file."""

    name: str
    max_header: int
    max_tensors: int
    max_rank: int
    min_dim: int
    dtypes: frozenset[str]
    name_pattern: re.Pattern[str]
    json: Limits


PROFILES: Final[Mapping[str, Profile]] = {
    "sktch": Profile(
        name="sktch",
        max_header=rules.MAX_HEADER,
        max_tensors=rules.MAX_TENSORS,
        max_rank=rules.MAX_RANK,
        min_dim=1,
        dtypes=SKTCH_DTYPES,
        name_pattern=re.compile(rules.NAME_PATTERN),
        json=Limits(rules.MAX_HEADER_DEPTH, rules.MAX_VALUES, rules.MAX_TENSORS + 2),
    ),
    "safetensors": Profile(
        name="safetensors",
        max_header=100_000_000,
        max_tensors=1_000_000,
        max_rank=64,
        min_dim=0,
        dtypes=frozenset(DTYPES),
        name_pattern=re.compile(r"[^\x00]*"),
        json=Limits(rules.MAX_HEADER_DEPTH, 10_000_000, 1_000_002, whitespace=True),
    ),
}


def parse_header(
    raw: bytes, data_size: int, where: str, profile: Profile
) -> tuple[dict[str, str], dict[str, Entry]]:
    """Parse and check a header.

    Args:
        raw: the header's bytes, padding included.
        data_size: the bytes of the file that follow the header.
        where: the file, for the error.
        profile: how strict to be.

    Returns:
        The metadata, and the entries in the order of their data, with absolute offsets.

    Raises:
        FormatError: SKT-005 to SKT-012 and SKT-020 to SKT-029, SKT-040.
    """
    if raw[:1] != b"{":
        refuse("SKT-005", where, f"expected '{{' as the header's first byte, got {shown(raw[:4])}")
    root = loads(raw, f"{where}: header", profile.json)
    metadata = _metadata(root.pop(METADATA, {}), where)
    if len(root) > profile.max_tensors:
        refuse("SKT-020", where, f"at most {profile.max_tensors} tensors, got {len(root)}")
    data_begin = rules.LENGTH_BYTES + len(raw)
    with collector_paused(len(raw)):
        entries = [_entry(name, value, where, profile, data_begin) for name, value in root.items()]
        entries.sort(key=lambda e: (e.begin, e.end))
        _check_cover(entries, data_begin, data_size, where)
        return metadata, {e.info.name: e for e in entries}


def data_order(infos: Iterable[TensorInfo]) -> list[TensorInfo]:
    """Return tensors in canonical order: element size descending, then name (SKT-030)."""
    return sorted(infos, key=lambda i: (-DTYPES[i.dtype].bits, i.name))


def canonical_header(metadata: Mapping[str, str], infos: Iterable[TensorInfo]) -> bytes:
    """Return length and header, padded so that the data starts at a multiple of 64 (SKT-031)."""
    quote = encode_basestring_ascii
    meta = ",".join(f"{quote(k)}:{quote(metadata[k])}" for k in sorted(metadata))
    parts = [f"{quote(METADATA)}:{{{meta}}}"]
    begin = 0
    for info in data_order(infos):
        end = begin + info.nbytes
        shape = ",".join(map(str, info.shape))
        parts.append(
            f'{quote(info.name)}:{{"dtype":"{info.dtype}","shape":[{shape}],'
            f'"data_offsets":[{begin},{end}]}}'
        )
        begin = end
    text = ("{" + ",".join(parts) + "}").encode("ascii")
    padded = -(-(rules.LENGTH_BYTES + len(text)) // rules.ALIGNMENT) * rules.ALIGNMENT
    text = text.ljust(padded - rules.LENGTH_BYTES, b" ")
    return len(text).to_bytes(rules.LENGTH_BYTES, "little") + text


def _metadata(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        refuse("SKT-040", where, f"{METADATA} must be an object, got {shown(value)}")
    for key, text in value.items():
        if not isinstance(text, str):
            refuse("SKT-040", where, f"{METADATA}.{shown(key)} must be a string, got {shown(text)}")
    return value


def _entry(name: str, value: Any, where: str, profile: Profile, data_begin: int) -> Entry:
    try:
        return _checked_entry(name, value, profile, data_begin)
    except _Broken as broken:
        at = where if broken.requirement == "SKT-021" else f"{where}: {shown(name)}"
        raise FormatError(broken.requirement, at, broken.message) from None


class _Broken(Exception):
    """A broken rule of one entry; who catches it knows where. Keeps the fast path free of text."""

    def __init__(self, requirement: str, message: str) -> None:
        self.requirement = requirement
        self.message = message
        super().__init__(message)


def _checked_entry(name: str, value: Any, profile: Profile, data_begin: int) -> Entry:
    if not profile.name_pattern.fullmatch(name):
        raise _Broken("SKT-021", f"bad tensor name {shown(name)}")
    if type(value) is not dict or value.keys() != _FIELDS:
        got = shown(sorted(value) if isinstance(value, dict) else value)
        raise _Broken("SKT-022", f"an entry has exactly dtype, shape and data_offsets, got {got}")
    dtype = value["dtype"]
    if not isinstance(dtype, str) or dtype not in profile.dtypes:
        raise _Broken("SKT-023", f"unknown dtype {shown(dtype)}")
    info = TensorInfo(name, dtype, _shape(value["shape"], profile))
    begin, end = _offsets(value["data_offsets"], info)
    return Entry(info, data_begin + begin, data_begin + end)


def _shape(value: Any, profile: Profile) -> tuple[int, ...]:
    if type(value) is not list or len(value) > profile.max_rank:
        raise _Broken("SKT-024", f"shape must be at most {profile.max_rank} integers")
    for dim in value:
        if type(dim) is not int:
            raise _Broken("SKT-024", f"shape must hold integers, got {shown(dim)}")
        if dim < profile.min_dim:
            raise _Broken("SKT-025", f"a dimension must be at least {profile.min_dim}, got {dim}")
    return tuple(value)


def _offsets(value: Any, info: TensorInfo) -> tuple[int, int]:
    if type(value) is not list or len(value) != 2:
        raise _Broken("SKT-026", f"data_offsets must be two integers, got {shown(value)}")
    begin, end = value
    if type(begin) is not int or type(end) is not int:
        raise _Broken("SKT-026", f"data_offsets must be two integers, got {shown(value)}")
    if begin > end:
        raise _Broken("SKT-026", f"data_offsets begin after they end: {begin} > {end}")
    # Everything is an unbounded integer: a product beyond 64 bits cannot wrap around.
    bits = math.prod(info.shape) * DTYPES[info.dtype].bits
    if (end - begin) * 8 != bits:
        got = f"data_offsets span {end - begin}"
        raise _Broken("SKT-027", f"{info.dtype} {list(info.shape)} takes {bits} bits, {got} bytes")
    return begin, end


def _check_cover(entries: list[Entry], data_begin: int, data_size: int, where: str) -> None:
    at = data_begin
    for entry in entries:
        if entry.begin != at:
            what = "overlaps the tensor before" if entry.begin < at else "leaves a hole before it"
            refuse(
                "SKT-028",
                f"{where}: {shown(entry.info.name)}",
                f"{what}: expected begin {at - data_begin}, got {entry.begin - data_begin}",
            )
        at = entry.end
    if at - data_begin != data_size:
        got = "truncated" if data_size < at - data_begin else "bytes after the last tensor"
        refuse(
            "SKT-029", where, f"{got}: expected {at - data_begin} bytes of data, got {data_size}"
        )
