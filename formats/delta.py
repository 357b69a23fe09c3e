"""Strict reader of a delta: one file, or the adapter folder that holds it."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sketchconv.formats import rules
from sketchconv.formats.container import Container
from sketchconv.formats.delta_coding import Table, finite
from sketchconv.formats.delta_document import DeltaDocument
from sketchconv.formats.delta_record import DeltaRecord
from sketchconv.formats.digest import tensor_digest
from sketchconv.formats.document import LIMITS
from sketchconv.formats.errors import FormatError, refuse
from sketchconv.formats.folder import safe_member
from sketchconv.formats.rules import ADAPTER_CONFIG, ADAPTER_NAME
from sketchconv.formats.sharding import INDEX_NAME, SINGLE_NAME
from sketchconv.formats.strict_json import loads
from sketchconv.formats.tensors import DTYPES, U8Array

_PIECE: Final = 1 << 20
_ONES: Final = np.array([value.bit_count() for value in range(256)], np.uint8)


class DeltaFile:
    """One open delta. Use `DeltaFile.open`; close it, or use it in a `with`.

    Attributes:
        path: the file or folder that was opened.
        container: the file's tensors.
        document: what it says about itself.
    """

    def __init__(self, path: Path, container: Container, document: DeltaDocument) -> None:
        self.path = path
        self.container = container
        self.document = document

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> DeltaFile:
        """Open a delta and check all that its header and document can break.

        Args:
            path: a file, or a folder with `sketch_adapter.safetensors`.

        Raises:
            FormatError: if it breaks a requirement, DLT-001 if it is a model. Tensor data is
                checked when it is used, or by `formats.delta_validate`.
            OSError: if the file is missing or not readable.
        """
        root = Path(path)
        file = safe_member(root, ADAPTER_NAME, "DLT-050") if root.is_dir() else root
        container = Container.open(file)
        try:
            document = _document(container)
            infos = {name: entry.info for name, entry in container.entries.items()}
            document.check_tensors(infos, container.path.name)
        except BaseException:
            container.close()
            raise
        return cls(root, container, document)

    @property
    def seal(self) -> str:
        """The digest of the document, which tells this delta from all others."""
        return self.document.seal

    def groups(self, record: DeltaRecord) -> npt.NDArray[np.bool_]:
        """Which groups of a weight change: bool `[out * G]`, row by row.

        Raises:
            FormatError: DLT-030 for padding bits that are not zero, DLT-031 for a wrong number of
                groups, SKT-013.
        """
        packed = self.packed_groups(record)
        if packed is None:
            return np.ones(record.groups, np.bool_)
        return np.unpackbits(packed, count=record.groups, bitorder="little").view(np.bool_)

    def packed_groups(self, record: DeltaRecord) -> U8Array | None:
        """The bits of `groups` as they are stored, eight in a byte; None where all groups change.

        Takes no more memory than the tensor: of a delta without its base the number of groups is
        only a claim. Raises as `groups`.
        """
        if record.groups_info is None:
            return None
        packed = self._stored(record.groups_name)
        where = f"{self.container.path.name}: {record.groups_name}"
        if int(packed[-1]) >> ((record.groups - 1) % 8 + 1):
            refuse("DLT-030", where, "padding bits that are not zero")
        parts = range(0, packed.size, _PIECE)
        count = sum(int(_ONES[packed[at : at + _PIECE]].sum(dtype=np.int64)) for at in parts)
        if count != record.changed:
            refuse("DLT-031", where, f"expected {record.changed} changed groups, got {count}")
        return packed

    def tuned(self, name: str, base: Table) -> Table:
        """Return the whole tuned table of a weight.

        Args:
            name: of the weight.
            base: the base's table `[out, G, K]` in its carrier; not changed.

        Raises:
            KeyError: if the delta does not change such a weight.
            ValueError: if `base` has another shape or dtype.
            FormatError: SKT-081 or DLT-030 to DLT-033 for bad data, DLT-041 if the result is not
                finite, DLT-042 if it is not the one that was recorded.
        """
        record = self.document.weights[name]
        out = self._changed(record, base)
        where = f"{self.container.path.name}: {name}"
        if not finite(out, record.bound.lut).all():
            refuse("DLT-041", where, "the tuned table is not finite")
        self._check_result(record, out, record.tuned, where)
        return out

    def reverted(self, name: str, tuned: Table) -> Table:
        """Return the base's whole table of a weight, from the tuned one. Raises as `tuned`.

        Raises:
            ValueError: if the mode is not its own inverse.
        """
        if not self.document.coding.invertible:
            raise ValueError(f"mode {self.document.coding.mode} cannot be inverted")
        record = self.document.weights[name]
        out = self._changed(record, tuned)
        where = f"{self.container.path.name}: {name}"
        self._check_result(record, out, record.bound.base, where)
        return out

    def _changed(self, record: DeltaRecord, table: Table) -> Table:
        bound, carrier = record.bound, DTYPES[record.bound.lut].numpy
        if table.shape != bound.shape or table.dtype != carrier:
            got = f"{table.dtype} {list(table.shape)}"
            raise ValueError(f"{record.name}: expected {carrier} {list(bound.shape)}, got {got}")
        mask, coding = self.groups(record), self.document.coding
        out = np.array(table, order="C").reshape(record.groups, bound.shape[2])
        stored, scales = self.values(record)
        if record.changed == record.groups:
            out[:] = coding.decode(out, stored, scales, bound.lut)
            return out.reshape(bound.shape)
        out[mask] = coding.decode(out[mask], stored, scales, bound.lut)
        return out.reshape(bound.shape)

    def values(self, record: DeltaRecord) -> tuple[Table, Table | None]:
        """The stored values `[changed, K]` and, for I8, the scales.

        Raises:
            FormatError: SKT-081, DLT-032 for values or scales that are not finite, or negative
                scales; DLT-033 for a group of an xor that changes nothing.
        """
        coding, where = self.document.coding, self.container.path.name
        stored = self._stored(record.lut_name)
        dtype = coding.stored_dtype(record.bound.lut)
        if coding.mode == "xor":
            if not stored.any(axis=1).all():
                refuse("DLT-033", f"{where}: {record.lut_name}", "a changed group changes nothing")
            return stored, None
        if not coding.scaled:
            if not finite(stored, dtype).all():
                refuse("DLT-032", f"{where}: {record.lut_name}", "values that are not finite")
            return stored, None
        scales = self._stored(record.scale_name)
        if not np.isfinite(scales).all() or np.signbit(scales).any():
            refuse("DLT-032", f"{where}: {record.scale_name}", "scales must be finite, from 0 up")
        return stored, scales

    def _stored(self, name: str) -> npt.NDArray[Any]:
        """A stored tensor whose digest was checked."""
        info, raw = self.container.entries[name].info, self.container.read(name)
        found, wanted = tensor_digest(info, raw), self.document.digests[name]
        if found != wanted:
            where = f"{self.container.path.name}: {name}"
            refuse("SKT-081", where, f"digest: recorded {wanted}, computed {found}")
        return np.frombuffer(raw, DTYPES[info.dtype].numpy).reshape(info.shape)

    def _check_result(self, record: DeltaRecord, out: Table, wanted: str, where: str) -> None:
        found = tensor_digest(record.base_info, out.data.cast("B"))
        if found != wanted:
            refuse("DLT-042", where, f"result: recorded {wanted}, computed {found}")

    def close(self) -> None:
        """Close the file; may be called again."""
        self.container.close()

    def __enter__(self) -> DeltaFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def is_delta(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an adapter folder, or a file whose document has the kind `delta`.

    A folder that also holds the weights of a model is that model. False for a file that is no
    container or has no document: its own reader says why.

    Raises:
        OSError: if nothing is there, or it is not readable.
    """
    root = Path(path)
    if root.is_dir():
        adapter = any((root / name).is_file() for name in (ADAPTER_NAME, ADAPTER_CONFIG))
        return adapter and not any((root / name).exists() for name in (SINGLE_NAME, INDEX_NAME))
    try:
        with Container.open(root) as container:
            text = container.metadata.get(rules.DOCUMENT_KEY, "")
        # Parsing a model's document takes long; it cannot hold this without being asked again.
        if f'"kind":"{rules.KIND_DELTA}"' not in text:
            return False
        value = loads(text.encode("utf-8", "surrogatepass"), root.name, LIMITS)
    except FormatError:
        return False
    return bool(value.get("kind") == rules.KIND_DELTA)


def _document(container: Container) -> DeltaDocument:
    where = container.path.name
    if container.metadata.get("format") != "pt":
        refuse("SKT-041", where, "the metadata must hold format 'pt'; is this a delta at all?")
    text = container.metadata.get(rules.DOCUMENT_KEY)
    if text is None:
        refuse("SKT-042", where, "no sktch document in the metadata: not a delta")
    return DeltaDocument.from_json(text, where)
