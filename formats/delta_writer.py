"""Writer of a delta: table after table into a spool, then one canonical file, atomically."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from sketchconv.formats import rules, staging
from sketchconv.formats.delta_coding import Coding, Table, finite
from sketchconv.formats.delta_document import DeltaDocument
from sketchconv.formats.delta_record import Bound, DeltaRecord
from sketchconv.formats.digest import tensor_digest
from sketchconv.formats.errors import refuse
from sketchconv.formats.header import canonical_header, data_order
from sketchconv.formats.laid_file import FileLayout, LaidFile
from sketchconv.formats.part import as_bytes, os_failures
from sketchconv.formats.rules import ADAPTER_CONFIG, ADAPTER_NAME
from sketchconv.formats.tensors import DTYPES, TensorInfo

_CHUNK: Final = 1 << 24


@dataclass(frozen=True, slots=True)
class Written:
    """What became of one table.

    Args:
        record: how it is recorded; None if nothing changed.
        tuned: the table that a reader will get, `[out, G, K]` in its carrier.
    """

    record: DeltaRecord | None
    tuned: Table


class DeltaWriter:
    """Writes one delta: `add` every table, then `commit`; until then only temporaries are there.

    Args:
        output: a file that ends in `.sktch`, or else a folder to make.
        coding: mode, value type and span.
        overwrite: replace a regular file, or an adapter folder, that is there.

    Raises:
        FormatError: if the coding breaks a requirement.
        OutputFailure: if the output exists or cannot be written.
    """

    def __init__(
        self, output: str | os.PathLike[str], coding: Coding, *, overwrite: bool = False
    ) -> None:
        coding.check("delta")
        self.path = Path(os.path.abspath(output))  # noqa: PTH100 (resolve would follow links)
        self.folder = self.path.suffix != ".sktch"
        self.coding = coding
        self._overwrite = overwrite
        self._records: dict[str, DeltaRecord] = {}
        self._digests: dict[str, str] = {}
        self._at: dict[str, int] = {}
        staging.check_target(self.path, folder=self.folder, overwrite=overwrite)
        opened = staging.open_folder if self.folder else staging.open_file
        self._lock = opened(self.path)
        try:
            with os_failures(self.path):
                spool = tempfile.TemporaryFile(dir=self.path.parent)  # noqa: SIM115
        except BaseException:
            staging.discard(self.path, folder=self.folder)
            os.close(self._lock)
            raise
        self._spool: IO[bytes] = spool

    def add(self, name: str, bound: Bound, base: Table, tuned: Table) -> Written:
        """Take one weight; nothing is stored for groups, or a weight, that did not change.

        Args:
            name: of the weight, each once.
            bound: what the delta is bound to.
            base, tuned: `[out, G, K]` in the carrier of `bound.lut`, C order, finite.

        Raises:
            ValueError: a weight that was given already.
            FormatError: DLT-032 or DLT-041 if the values leave the range of their type.
            OutputFailure: the disk is full or fails.
        """
        if name in self._records:
            raise ValueError(f"{name} was given twice")
        width = bound.shape[2]
        flat = np.ascontiguousarray(base).reshape(-1, width)
        after = np.array(tuned, order="C").reshape(-1, width)
        mask = (flat.view(np.uint8) != after.view(np.uint8)).any(axis=1)
        stored, scales = self._encoded(name, bound, flat[mask], after[mask])
        after[mask] = self.coding.decode(flat[mask], stored, scales, bound.lut)
        if not finite(after, bound.lut).all():
            refuse("DLT-041", name, f"beyond the range of {bound.lut}")
        whole = after.reshape(bound.shape)
        if np.array_equal(after.view(np.uint8), flat.view(np.uint8)):
            return Written(None, whole)
        info = TensorInfo(name, bound.lut, bound.shape)
        tuned_digest = tensor_digest(info, as_bytes(whole))
        record = DeltaRecord(name, bound, int(np.count_nonzero(mask)), tuned_digest)
        record.check("delta")
        self._keep(record, mask, stored, scales)
        return Written(record, whole)

    def _encoded(
        self, name: str, bound: Bound, base: Table, tuned: Table
    ) -> tuple[Table, Table | None]:
        if not len(base):
            dtype = self.coding.stored_dtype(bound.lut)
            none = np.zeros(base.shape, DTYPES[dtype].numpy)
            return none, np.zeros(0, np.float16) if self.coding.scaled else None
        stored, scales = self.coding.encode(base, tuned, bound.lut)
        dtype = self.coding.stored_dtype(bound.lut)
        floats = self.coding.mode != "xor" and not self.coding.scaled
        if (floats and not finite(stored, dtype).all()) or (
            scales is not None and not np.isfinite(scales).all()
        ):
            what = "scales" if scales is not None else f"values {dtype}"
            refuse("DLT-032", name, f"a change is beyond the range of {what}; take values 'same'")
        return stored, scales

    def _keep(self, record: DeltaRecord, mask: Table, stored: Table, scales: Table | None) -> None:
        arrays: dict[str, Any] = {record.lut_name: stored, record.scale_name: scales}
        arrays[record.groups_name] = np.packbits(mask, bitorder="little")
        for info in record.infos(self.coding):
            view = as_bytes(arrays[info.name])
            self._at[info.name] = self._spool.tell()
            self._digests[info.name] = tensor_digest(info, view)
            with os_failures(self.path):
                self._spool.write(view)
        self._records[record.name] = record

    def commit(self, base: Mapping[str, Any], task: Mapping[str, Any], tool: str) -> DeltaDocument:
        """Write the file, force it to the disk, rename it into place; return its document.

        Args:
            base: what the base is, free JSON.
            task: what the delta is for, free JSON.
            tool: program and version.

        Raises:
            FormatError: the document breaks a requirement, or the header is too long.
            TypeError, ValueError: base or task have no canonical form.
            OutputFailure: the disk is full or fails, or the target appeared meanwhile.
        """
        document = DeltaDocument(self._records, self.coding, self._digests, base, task, tool)
        # As it will be read: free text may hold what a writer lets pass and no reader takes.
        DeltaDocument.from_json(document.to_json(), self.path.name)
        file = staging.staging_path(self.path)
        if self.folder:
            config = adapter_config(document)
            staging.write_file(file, ADAPTER_CONFIG, config)
            file = file / ADAPTER_NAME
        self._write(file, document)
        if self.folder:
            with os_failures(self.path):
                staging.sync_folder(staging.staging_path(self.path))
        staging.publish(self.path, folder=self.folder, overwrite=self._overwrite)
        self.close()
        return document

    def _write(self, file: Path, document: DeltaDocument) -> None:
        infos = data_order(document.infos().values())
        layout = _layout(document, infos, self.path.name)
        with os_failures(self.path):
            fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            laid = LaidFile(fd, self.path, layout)
            for info in infos:
                at = self._at[info.name]
                for begin in range(0, info.nbytes, _CHUNK):
                    count = min(_CHUNK, info.nbytes - begin)
                    with os_failures(self.path):
                        self._spool.seek(at + begin)
                        laid.append(info.name, self._spool.read(count))
            laid.finish()
        finally:
            os.close(fd)

    def abort(self) -> None:
        """Remove the temporary; nothing is left. Does nothing after a commit."""
        if self._lock >= 0:
            staging.discard(self.path, folder=self.folder)
            self.close()

    def close(self) -> None:
        """Close what is open."""
        self._spool.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> DeltaWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.abort()


def adapter_config(document: DeltaDocument) -> bytes:
    """`sketch_adapter_config.json`: what a person, or the Hub, reads; never authoritative."""
    task = document.task
    value = {
        "adapter_type": "sktch-delta",
        "base_model_name_or_path": document.base.get("id"),
        "base_model_revision": document.base.get("revision"),
        "format": document.version,
        "mode": document.coding.mode,
        "values": document.coding.values,
        "weights": len(document.weights),
        "task": dict(task),
        "seal": document.seal,
    }
    return (json.dumps(value, indent=2, ensure_ascii=True) + "\n").encode("ascii")


def _layout(document: DeltaDocument, infos: list[TensorInfo], where: str) -> FileLayout:
    metadata = {"format": "pt", rules.DOCUMENT_KEY: document.to_json()}
    header = canonical_header(metadata, infos)
    if len(header) - rules.LENGTH_BYTES > rules.MAX_HEADER or len(infos) > rules.MAX_TENSORS:
        refuse("SKT-003", where, f"{len(infos)} tensors and {len(header)} bytes are too many")
    begin, at = {}, len(header)
    for info in infos:
        begin[info.name] = at
        at += info.nbytes
    return FileLayout(header, begin, {i.name: i.nbytes for i in infos}, at)
