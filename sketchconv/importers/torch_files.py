"""Tensors in files of `torch.save` and in plain pickles of tensors, as a store; nothing is run."""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from sketchconv.errors import SourceError
from sketchconv.formats.container import open_regular, pread_exact
from sketchconv.formats.tensors import DTYPES, TensorInfo
from sketchconv.importers.machine import Builders, Known
from sketchconv.importers.unpickle import load
from sketchconv.importers.windows import Span, Window

_ZIP: Final = b"PK\x03\x04"
_LEGACY: Final = 0x1950A86A20F9469CFC6C
_MAX_RANK: Final = 8
_MAX_TENSORS: Final = 200_000


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of elements in the file."""

    dtype: str
    span: Span


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor in a storage; sizes and offset in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        """Whether its values follow each other in row-major order."""
        step = 1
        for size, stride in zip(self.shape[::-1], self.strides[::-1], strict=True):
            if size > 1 and stride != step:
                return False
            step *= size
        return True


class TorchStore:
    """The tensors of a `.pt`, `.bin` or `.pkl` file, by the keys of the dict that it holds.

    Members of a pair or list have the names `key.0`, `key.1`. Numbers and texts are left out.

    Raises:
        SourceError: it holds anything else than tensors in a dict, is cut off, or names code.
    """

    def __init__(self, path: Path) -> None:
        self._where = path.name
        try:
            self._fd, self.nbytes = open_regular(path)
        except OSError as error:
            raise SourceError(f"{path.name}: cannot be read ({error.strerror})") from None
        self._closed = False
        self.paths: tuple[Path, ...] = (path,)
        self._members: dict[str, Span] = {}
        try:
            found = self._load(path)
            self._tensors = _named(found, self._where)
            self._infos = {n: self._info(n, ref) for n, ref in self._tensors.items()}
        except BaseException:
            self.close()
            raise

    def _load(self, path: Path) -> Any:
        head = pread_exact(self._fd, min(4, self.nbytes), 0, self._where)
        whole = Span(0, self.nbytes)
        if head == _ZIP:
            self._members = _zip_members(path, self._fd, self.nbytes)
            whole = self._members["data.pkl"]
            return self._value(Window(self._fd, whole, self._where), self._zip_storage)
        if head[:1] != b"\x80":
            raise SourceError(f"{self._where}: neither a file of torch.save nor a pickle")
        found = self._value(Window(self._fd, whole, self._where), self._no_storage)
        return self._no_storage(None) if found == _LEGACY else found

    def _value(self, window: Window, storage: Callable[[Any], Any]) -> Any:
        return load(window, Builders(self._tensor, storage, self._nested), self._where)

    def _no_storage(self, pid: Any) -> Any:
        raise SourceError(
            f"{self._where}: a file of an old torch.save, before version 1.6; load and save it with"
            " a newer torch, or as safetensors"
        )

    def _nothing(self, value: Any) -> Any:
        raise SourceError(f"{self._where}: a storage in a form that torch does not write")

    def _zip_storage(self, pid: Any) -> Storage:
        dtype, key, count = _persistent(pid, self._where)
        span = self._members.get(f"data/{key}")
        if span is None or count * DTYPES[dtype].itemsize > span.length:
            raise SourceError(f"{self._where}: storage {key!r} is missing or cut off")
        return Storage(dtype, span)

    def _nested(self, span: Span) -> Storage:
        """A storage that was pickled by itself: four pickles, its key, and its bytes."""
        window = Window(self._fd, span, self._where)
        pending: list[tuple[str, str, int]] = []

        def note(pid: Any) -> Any:
            pending.append(_persistent(pid, self._where))
            return pending[-1]

        # No storage inside a storage: that would nest without end.
        builders = Builders(self._nothing, note, self._nothing)
        magic, _, _, found, keys = (load(window, builders, self._where) for _ in range(5))
        if magic != _LEGACY or len(pending) != 1 or found != pending[0] or keys != [found[1]]:
            raise SourceError(f"{self._where}: a storage in a form that torch does not write")
        dtype, _, count = pending[0]
        if struct.unpack("<q", window.take(8))[0] != count:
            raise SourceError(f"{self._where}: a storage whose length contradicts its name")
        return Storage(dtype, window.span(count * DTYPES[dtype].itemsize))

    def _tensor(self, arguments: tuple[Any, ...]) -> TensorRef:
        """A tensor of (storage, offset, shape, strides, requires_grad, hooks)."""
        if len(arguments) < 4 or not isinstance(arguments[0], Storage):
            raise SourceError(f"{self._where}: a tensor without a storage")
        storage, offset, shape, strides = arguments[:4]
        numbers = (offset, *_numbers(shape, self._where), *_numbers(strides, self._where))
        if len(shape) != len(strides) or any(n < 0 for n in (offset, *numbers)):
            raise SourceError(f"{self._where}: a tensor of shape {shape} with strides {strides}")
        size = DTYPES[storage.dtype].itemsize
        last = sum((d - 1) * s for d, s in zip(shape, strides, strict=True)) + offset + 1
        if 0 not in shape and last * size > storage.span.length:
            raise SourceError(f"{self._where}: a tensor of shape {shape} beyond its storage")
        return TensorRef(storage, offset, tuple(shape), tuple(strides))

    def _info(self, name: str, ref: TensorRef) -> TensorInfo:
        if not ref.contiguous:
            raise SourceError(
                f"{self._where}: {name}: not stored row by row; save it with `.contiguous()`"
            )
        return TensorInfo(name, ref.storage.dtype, ref.shape)

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor, in the dict's order."""
        return MappingProxyType(self._infos)

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of a tensor."""
        ref, info = self._tensors[name], self._infos[name]
        if self._closed:
            raise SourceError(f"{self._where}: the file is closed")
        if not 0 <= begin <= end <= info.nbytes:
            raise SourceError(f"{self._where}: {name}: bytes {begin} to {end} of {info.nbytes}")
        at = ref.storage.span.begin + ref.offset * DTYPES[info.dtype].itemsize + begin
        return pread_exact(self._fd, end - begin, at, self._where)

    def close(self) -> None:
        """Close the file; may be called again."""
        if not self._closed:
            self._closed = True
            os.close(self._fd)


def _numbers(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > _MAX_RANK:
        raise SourceError(f"{where}: a tensor whose shape is no tuple of at most {_MAX_RANK}")
    if any(type(v) is not int for v in value):
        raise SourceError(f"{where}: a tensor whose shape is not made of integers")
    return value


def _persistent(pid: Any, where: str) -> tuple[str, str, int]:
    """Dtype, key and number of elements of ("storage", type, key, location, count, ...)."""
    known = isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"
    if not known or not isinstance(pid[1], Known) or pid[1].kind != "storage":
        raise SourceError(f"{where}: a reference that is not one to a storage")
    if not isinstance(pid[2], str) or type(pid[4]) is not int or pid[4] < 0:
        raise SourceError(f"{where}: a storage without a key or a length")
    if pid[5:] not in ((), (None,)):
        raise SourceError(f"{where}: a view of a storage, as only an old torch writes it")
    return pid[1].dtype, pid[2], pid[4]


def _named(value: Any, where: str) -> dict[str, TensorRef]:
    if not isinstance(value, dict):
        raise SourceError(f"{where}: holds no dict of tensors")
    found: dict[str, TensorRef] = {}
    for key, item in value.items():
        members = item if isinstance(item, tuple | list) else None
        pairs = [(str(key), item)] if members is None else _members(str(key), members)
        found |= {name: ref for name, ref in pairs if isinstance(ref, TensorRef)}
        odd = next((v for _, v in pairs if isinstance(v, dict | tuple | list | Storage)), None)
        if odd is not None or len(found) > _MAX_TENSORS:
            raise SourceError(f"{where}: {key!r}: expected tensors by name, or pairs of them")
    return found


def _members(key: str, items: tuple[Any, ...] | list[Any]) -> list[tuple[str, Any]]:
    return [(f"{key}.{number}", item) for number, item in enumerate(items)]


def _zip_members(path: Path, fd: int, size: int) -> dict[str, Span]:
    """Names below the archive's folder -> where their bytes are; all are stored uncompressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error):
        raise SourceError(f"{path.name}: cut off or damaged; download it again") from None
    root = next((e.filename[: -len("data.pkl")] for e in entries
                 if e.filename.endswith("/data.pkl")), None)  # fmt: skip
    if root is None:
        raise SourceError(f"{path.name}: a ZIP archive, but none of torch.save (no data.pkl)")
    found: dict[str, Span] = {}
    for entry in entries:
        if entry.filename.startswith(root) and not entry.is_dir():
            found[entry.filename[len(root) :]] = _stored_span(entry, fd, size, path.name)
    order = found.get("byteorder")
    if order is not None and pread_exact(fd, order.length, order.begin, path.name) != b"little":
        raise SourceError(f"{path.name}: not little-endian")
    return found


def _stored_span(entry: zipfile.ZipInfo, fd: int, size: int, where: str) -> Span:
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise SourceError(
            f"{where}: {entry.filename}: compressed or encrypted, as torch never does"
        )
    if not 0 <= entry.header_offset <= size - 30:
        raise SourceError(f"{where}: {entry.filename}: outside the file")
    head = pread_exact(fd, 30, entry.header_offset, where)
    begin = entry.header_offset + 30 + sum(struct.unpack("<HH", head[26:30]))
    if head[:4] != _ZIP or entry.file_size != entry.compress_size or entry.file_size > size - begin:
        raise SourceError(f"{where}: {entry.filename}: outside the file, or damaged")
    return Span(begin, entry.file_size)
