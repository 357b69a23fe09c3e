"""Validate a whole sketch: every rule of the reader, then every byte of every tensor."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sketchconv.formats import rules
from sketchconv.formats.coverage import suffixes
from sketchconv.formats.digest import tensor_hash
from sketchconv.formats.errors import FormatError
from sketchconv.formats.folder import CONFIG_NAME
from sketchconv.formats.header import canonical_header, data_order
from sketchconv.formats.manifest import Manifest
from sketchconv.formats.packing import nonzero_padding
from sketchconv.formats.reader import SktchFile, SktchModel
from sketchconv.formats.sketches import SketchRecord
from sketchconv.formats.tensors import DTYPES, U8Array, carried_to_f32

Progress = Callable[[int, int], None]
_CHUNK: Final = 1 << 24


@dataclass(frozen=True, slots=True)
class Finding:
    """One broken requirement: its number, the file and tensor, expected and found."""

    requirement: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message} [{self.requirement}]"


def validate(path: str | os.PathLike[str], progress: Progress | None = None) -> Iterator[Finding]:
    """Check everything that the specification asks of a bundle or a folder.

    A header that cannot be accepted ends the check with that one finding. Otherwise every tensor
    is read once, in pieces, and all findings are given.

    Args:
        path: a bundle, a folder, or one weight file of a folder.
        progress: called with the bytes done and the bytes in all.

    Yields:
        Each broken requirement; nothing for a valid sketch.

    Raises:
        OSError: if something is missing or not readable.
    """
    try:
        model = SktchModel.open(path)
    except FormatError as error:
        yield _finding(error)
        return
    with model:
        yield from _check_config(model)
        total = sum(info.nbytes for info in model.tensors.values())
        done = 0
        for name, shard in model.shards.items():
            yield from _check_header(shard, name, model)
            for tensor in shard.container.entries:
                yield from _check_tensor(model, shard, name, tensor)
                done += model.tensors[tensor].nbytes
                if progress is not None:
                    progress(done, total)


def _finding(error: FormatError) -> Finding:
    return Finding(error.requirement, error.where, error.message)


def _check_config(model: SktchModel) -> Iterator[Finding]:
    if model.is_bundle and CONFIG_NAME not in model.files:
        return
    where = f"{model.path.name}: {CONFIG_NAME}"
    try:
        config = model.config()
    except FormatError as error:
        yield _finding(error)
        return
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "sktch":
        yield Finding("SKT-108", where, "quantization_config.quant_method must be 'sktch'")
    elif str(quantization.get("format")).split(".")[0] != str(rules.FORMAT_MAJOR):
        got = quantization.get("format")
        yield Finding("SKT-108", where, f"quantization_config.format must be 1.x, got {got!r}")


def _check_header(shard: SktchFile, name: str, model: SktchModel) -> Iterator[Finding]:
    """Check what only Writers must do; libraries that rewrite a folder's files need not."""
    metadata = shard.container.metadata
    for key in metadata.keys() - {"format", rules.DOCUMENT_KEY}:
        yield Finding("SKT-043", name, f"unexpected metadata {key[:80]!r}")
    if model.is_bundle and Path(name).suffix == ".sktch":
        infos = [entry.info for entry in shard.container.entries.values()]
        if infos != data_order(infos):
            yield Finding("SKT-030", name, "the tensors are not in canonical order")
        elif canonical_header(metadata, infos) != shard.container.header():
            yield Finding("SKT-031", name, "the header is not in canonical form")


def _check_tensor(model: SktchModel, shard: SktchFile, file: str, tensor: str) -> Iterator[Finding]:
    info, where = model.tensors[tensor], f"{file}: {tensor}"
    manifest = model.manifest
    record = _record_of(tensor, manifest)
    running, bad = tensor_hash(info), _Bad()
    unit = record.index_info.shape[2] if record is not None else 1
    step = max(_CHUNK // unit // 8 * 8, 8) * unit
    try:
        for begin in range(0, info.nbytes, step):
            data = shard.container.read(tensor, begin, min(begin + step, info.nbytes))
            running.update(data)
            if record is not None:
                bad.look(record, tensor, data)
            elif tensor in manifest.sketches and data != b"\0":
                yield Finding("SKT-076", where, f"expected a zero byte, got {data!r}")
    except FormatError as error:
        yield _finding(error)
        return
    if running.hexdigest() != manifest.digests[tensor]:
        expected, got = manifest.digests[tensor], running.hexdigest()
        yield Finding("SKT-081", where, f"digest: recorded {expected}, computed {got}")
    if bad.padding:
        yield Finding("SKT-071", where, f"{bad.padding} planes have padding bits that are not zero")
    if bad.nonfinite:
        yield Finding("SKT-072", where, f"{bad.nonfinite} LUT entries or scales are not finite")


def _record_of(tensor: str, manifest: Manifest) -> SketchRecord | None:
    """The record of the sketch that a stored tensor belongs to."""
    for suffix in suffixes(manifest.version):
        if tensor.endswith(suffix):
            return manifest.sketches.get(tensor.removesuffix(suffix) + rules.WEIGHT_SUFFIX)
    return None


@dataclass
class _Bad:
    """Counts of what is wrong inside the data of a sketch."""

    padding: int = 0
    nonfinite: int = 0

    def look(self, record: SketchRecord, tensor: str, data: bytes) -> None:
        if tensor == record.index_name:
            packed: U8Array = np.frombuffer(data, np.uint8).reshape(-1, record.index_info.shape[2])
            self.padding += nonzero_padding(packed, record.bits, record.group_size)
        else:
            lut: npt.NDArray[Any] = np.frombuffer(data, DTYPES[record.lut_dtype].numpy)
            finite = np.isfinite(carried_to_f32(lut, record.lut_dtype))
            self.nonfinite += lut.size - int(np.count_nonzero(finite))
