"""A peer's checkpoint as a source: quantized weights come as ready indices and tables."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from sketchconv.errors import SourceError, WeightError
from sketchconv.formats.errors import FormatError
from sketchconv.formats.packing import pack
from sketchconv.formats.sketches import SketchRecord
from sketchconv.formats.tensors import DTYPES, TensorInfo, U8Array, carried_to_f32
from sketchconv.importers.base import Carrier, Checkpoint, Importer, Store, Weight
from sketchconv.sources.base import Float32, Source
from sketchconv.sources.config import dump_json
from sketchconv.sources.sketch import decoded_rows, dense_bytes, dense_dtype
from sketchconv.sources.values import row_bytes, stored_info, to_float32, to_stored


class ImportedSource:
    """What a checkpoint stands for: dense weights by their names, of which some are ready sketches.

    `rows` of such a weight gives, for each row, its packed indices and behind them its tables, as
    they are stored in a sketch; `float32` and `stored` give its values. All other tensors are the
    checkpoint's own, or the base's.

    Args:
        checkpoint: the peer's tensors.
        importer: who knows them.
        weights: what the importer found.
        config: the dense model's config.
        files: the side files.
        folders: where all this is; an output must not replace it.
        revision: the hub's commit of a download.

    Raises:
        SourceError: two weights of one name, or none at all.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        importer: Importer,
        weights: Sequence[Weight],
        config: Mapping[str, Any],
        files: Mapping[str, bytes],
        *,
        folders: Sequence[Path] = (),
        revision: str | None = None,
    ) -> None:
        self.id, self.revision, self.format = checkpoint.id, revision, importer.name
        self.importer = importer
        self._store: Store = checkpoint.store
        self._rest: Source | None = None
        self._config, self._files = dict(config), dict(files)
        self._weights = {weight.record.name: weight for weight in weights}
        self._check(weights)
        self._infos = self._dense_infos()
        self.nbytes = self._store.nbytes
        self.paths: tuple[Path, ...] = (*folders, *self._store.paths)

    def _check(self, weights: Sequence[Weight]) -> None:
        if not weights:
            raise SourceError(
                f"{self.id}: already quantized (quant_method {self.format!r}), but it has no tensor"
                f" of the layout that is known ({self.importer.layout}); convert the original bf16,"
                " fp16 or fp32 checkpoint instead"
            )
        if len(self._weights) != len(weights):
            raise SourceError(f"{self.id}: two quantized weights of one name")
        for weight in weights:
            try:
                weight.record.check(self.id)
            except FormatError as error:
                raise SourceError(str(error)) from None

    def _dense_infos(self) -> dict[str, TensorInfo]:
        owners = {part: weight for weight in self._weights.values() for part in weight.parts}
        found: dict[str, TensorInfo] = {}
        for name, info in self._store.infos.items():
            if name in owners:
                record = owners[name].record
                found[record.name] = TensorInfo(record.name, dense_dtype(record), record.shape)
            elif name in self._weights:
                raise SourceError(f"{self.id}: {name}: stored both dense and quantized")
            else:
                found[name] = stored_info(info, self.id)
        return found

    def beside(self, rest: Source) -> ImportedSource:
        """This source, which from here on has all tensors of `rest` that it lacks, and owns it."""
        self._rest = rest
        self._infos |= {n: info for n, info in rest.infos.items() if n not in self._infos}
        self.nbytes += rest.nbytes
        self.paths += rest.paths
        return self

    @property
    def records(self) -> Mapping[str, SketchRecord]:
        """How each ready weight is stored in a sketch, by name."""
        return MappingProxyType({name: w.record for name, w in self._weights.items()})

    @property
    def origin(self) -> dict[str, Any]:
        """Whose layout it is and which formula its values follow, as plain JSON."""
        bits = sorted({record.bits for record in self.records.values()})
        return {"layout": self.importer.layout, "formula": self.importer.formula, "bits": bits}

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the dense model, in the checkpoint's order."""
        return MappingProxyType(self._infos)

    def rows(self, name: str, begin: int, end: int) -> bytes:
        """Bytes of rows [begin, end); of a ready weight its packed indices, then its tables.

        Raises:
            SourceError: no such tensor or rows, or what the file holds is no index or table.
            WeightError: a value of a table is not finite.
        """
        size = row_bytes(self._info(name), begin, end)
        weight = self._weights.get(name)
        if weight is None:
            if self._rest is not None and name not in self._store.infos:
                return self._rest.rows(name, begin, end)
            info = self._store.infos[name]
            size = row_bytes(info, begin, end)
            return self._store.read(name, begin * size, end * size)
        if begin == end:
            return b""
        codes, tables = weight.rows(begin, end)
        _check_tables(weight.record, tables, begin)
        shape = (end - begin, weight.record.groups, weight.record.group_size)
        packed = pack(codes.reshape(shape), weight.record.bits).reshape(len(codes), -1)
        stored = np.ascontiguousarray(tables).reshape(len(codes), -1).view(np.uint8)
        # Row by row, so that a digest of the bytes does not depend on how rows are cut into chunks.
        return np.concatenate([packed, stored], axis=1).tobytes()

    def ready(self, name: str, raw: bytes) -> tuple[U8Array, Carrier]:
        """Packed indices uint8 ``[rows, G, bytes]`` and tables ``[rows, G, 2**bits]`` of `raw`."""
        record = self._weights[name].record
        index, lut = record.index_info, record.lut_info
        sizes = index.nbytes // index.shape[0], lut.nbytes // lut.shape[0]
        rows = np.frombuffer(raw, np.uint8).reshape(-1, sum(sizes))
        packed = np.ascontiguousarray(rows[:, : sizes[0]]).reshape(-1, *index.shape[1:])
        tables = np.ascontiguousarray(rows[:, sizes[0] :]).view(DTYPES[lut.dtype].numpy)
        return packed, tables.reshape(-1, *lut.shape[1:])

    def _values(self, weight: Weight, raw: bytes) -> Float32:
        packed, tables = self.ready(weight.record.name, raw)
        return decoded_rows(weight.record, packed.tobytes() + tables.tobytes())

    def _info(self, name: str) -> TensorInfo:
        try:
            return self._infos[name]
        except KeyError:
            raise SourceError(f"{self.id}: no tensor {name!r}") from None

    def float32(self, name: str, raw: bytes) -> Float32:
        """The values of `raw`: of a ready weight those of the peer's formula, exact."""
        weight = self._weights.get(name)
        if weight is not None:
            return self._values(weight, raw)
        if self._rest is not None and name not in self._store.infos:
            return self._rest.float32(name, raw)
        return to_float32(raw, self._store.infos[name])

    def stored(self, name: str, raw: bytes) -> bytes:
        """Dense bytes of `raw` in the dtype of `infos`."""
        weight = self._weights.get(name)
        if weight is not None:
            return dense_bytes(self._values(weight, raw), dense_dtype(weight.record))
        if self._rest is not None and name not in self._store.infos:
            return self._rest.stored(name, raw)
        return to_stored(raw, self._store.infos[name])

    def config(self) -> dict[str, Any]:
        """The dense model's config: without the peer's settings and `auto_map`."""
        return copy.deepcopy(self._config)

    def files(self) -> dict[str, bytes]:
        """Side files, with the dense model's config."""
        return {**self._files, "config.json": dump_json(self._config)}

    def close(self) -> None:
        """Close every file."""
        self._store.close()
        if self._rest is not None:
            self._rest.close()


def _check_tables(record: SketchRecord, tables: Carrier, begin: int) -> None:
    values = carried_to_f32(tables, record.lut_dtype)
    if np.isfinite(values).all():
        return
    row = int(np.argmin(np.isfinite(values).all(axis=(1, 2))))
    raise WeightError(
        f"{record.name}: the tables of row {begin + row} hold values that are not finite in"
        f" {record.lut_dtype}; repair the checkpoint"
    )
