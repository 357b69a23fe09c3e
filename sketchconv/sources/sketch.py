"""A sketch as a source of dense weights: rows are decoded when they are read, bit-exact."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from sketchconv.errors import SourceError
from sketchconv.formats.reader import SktchModel
from sketchconv.formats.rules import RESERVED_PREFIX
from sketchconv.formats.sketches import SketchRecord
from sketchconv.formats.tensors import DTYPES, TensorInfo, f32_to_bf16
from sketchconv.sources.base import Float32
from sketchconv.sources.config import dump_json, strip_remote_code
from sketchconv.sources.files import collect_files, is_side_file, without_remote_code
from sketchconv.sources.folder import ModelFolder
from sketchconv.sources.values import row_bytes, row_count, to_float32


class SketchSource:
    """A `.sktch` file or a sketch folder, seen as the dense model that it stands for.

    A sketched weight has the dtype of its LUT, in which its values are exact, a shaped one F32;
    `rows` gives its packed indices and, behind them, its LUTs or scales. All other tensors are as
    they are stored.

    Args:
        path: the file or the folder.

    Raises:
        FormatError: it breaks a rule of the format.
        SourceError: it cannot be read.
    """

    format = "sktch"
    revision: str | None = None

    def __init__(self, path: Path) -> None:
        try:
            self._model = SktchModel.open(path)
        except OSError as error:
            raise SourceError(f"{path.name}: cannot be read ({error.strerror})") from None
        self.id = path.name or path.resolve().name
        self.paths: tuple[Path, ...] = (path.resolve(),)
        shards = self._model.shards.values()
        self.nbytes = sum(shard.container.size for shard in shards)
        self._records = dict(self._model.manifest.sketches)
        try:
            self._config = self._read_config()
            self._infos = self._dense_infos()
        except BaseException:
            self.close()
            raise

    def _read_config(self) -> dict[str, Any]:
        config = self._model.config()
        found = config.pop("quantization_config", None)
        method = found.get("quant_method") if isinstance(found, dict) else None
        if method != "sktch":
            raise SourceError(f"{self.id}: config.json has quant_method {method!r}, not 'sktch'")
        stripped: dict[str, Any] = strip_remote_code(config)
        return stripped

    def _dense_infos(self) -> dict[str, TensorInfo]:
        parts = {n for r in self._records.values() for n in (r.index_name, r.lut_name)}
        stored = {
            name: info
            for name, info in self._model.tensors.items()
            if name not in parts
            and name not in self._records
            and not name.startswith(RESERVED_PREFIX)
        }
        sketched = {
            name: TensorInfo(name, dense_dtype(record), record.shape)
            for name, record in self._records.items()
        }
        return {**sketched, **stored}

    @property
    def origin(self) -> Mapping[str, Any]:
        """What the sketch was made from: id, revision, format, digest."""
        return MappingProxyType(dict(self._model.manifest.source))

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The recipe that the sketch was made by."""
        return MappingProxyType(dict(self._model.manifest.recipe))

    @property
    def aliases(self) -> Mapping[str, str]:
        """Tied weights: absent name -> the name of the one that is stored."""
        return MappingProxyType(dict(self._model.manifest.aliases))

    @property
    def records(self) -> Mapping[str, SketchRecord]:
        """How each sketched weight is stored, by name."""
        return MappingProxyType(self._records)

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the dense model that is not an alias: the sketched ones first."""
        return MappingProxyType(self._infos)

    def rows(self, name: str, begin: int, end: int) -> bytes:
        """Stored bytes of rows [begin, end); of a sketch the indices, then the LUTs."""
        record = self._records.get(name)
        if record is None:
            return self._read(self._info(name), begin, end)
        index, lut = record.index_info, record.lut_info
        return self._read(index, begin, end) + self._read(lut, begin, end)

    def _read(self, info: TensorInfo, begin: int, end: int) -> bytes:
        size = row_bytes(info, begin, end)
        return self._model.read(info.name, begin * size, end * size)

    def _info(self, name: str) -> TensorInfo:
        try:
            return self._infos[name]
        except KeyError:
            raise SourceError(f"{self.id}: no tensor {name!r}") from None

    def tables(self, name: str, begin: int, end: int) -> npt.NDArray[Any]:
        """LUTs, or scales of a grid, of rows [begin, end) of a sketch: ``[rows, G, entries]``."""
        info = self._records[name].lut_info
        data = np.frombuffer(self._read(info, begin, end), DTYPES[info.dtype].numpy)
        return data.reshape(end - begin, *info.shape[1:])

    def float32(self, name: str, raw: bytes) -> Float32:
        """The values of `raw`: decoded for a sketch, exact in every case but F64."""
        record = self._records.get(name)
        return to_float32(raw, self._info(name)) if record is None else decoded_rows(record, raw)

    def stored(self, name: str, raw: bytes) -> bytes:
        """Dense bytes of `raw`: a sketch decoded, in its LUT's dtype; others as they are."""
        record = self._records.get(name)
        if record is None:
            return raw
        return dense_bytes(decoded_rows(record, raw), dense_dtype(record))

    def config(self) -> dict[str, Any]:
        """The dense model's config: without `quantization_config` and `auto_map`."""
        return copy.deepcopy(self._config)

    def files(self) -> dict[str, bytes]:
        """Side files, with the dense model's config."""
        if self._model.is_bundle:
            names = filter(is_side_file, self._model.files)
            files = {n: without_remote_code(n, self._model.file(n)) for n in names}
        else:
            files = collect_files(ModelFolder(self._model.path))
        return {**files, "config.json": dump_json(self._config)}

    def close(self) -> None:
        """Close every file."""
        self._model.close()

    def __enter__(self) -> SketchSource:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def dense_dtype(record: SketchRecord) -> str:
    """A dtype in which the values of a sketch are exact."""
    return "F32" if record.shaped else record.lut_dtype


def dense_bytes(values: Float32, dtype: str) -> bytes:
    """Values of a sketch in F16, BF16 or F32, in which they are exact."""
    if dtype == "BF16":
        return f32_to_bf16(values).tobytes()
    return values.astype("<f2" if dtype == "F16" else "<f4", copy=False).tobytes()


def split_rows(record: SketchRecord, raw: bytes) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]:
    """Packed indices uint8 ``[rows, G, bytes]`` and LUTs or scales in their carrier, writable."""
    index, lut = record.index_info, record.lut_info
    sizes = index.nbytes // row_count(index), lut.nbytes // row_count(lut)
    rows = len(raw) // sum(sizes)
    data = np.frombuffer(bytearray(raw), np.uint8)
    codes = data[: rows * sizes[0]].reshape(rows, *index.shape[1:])
    # A copy: the tables may begin at an odd address.
    tables = data[rows * sizes[0] :].copy().view(DTYPES[lut.dtype].numpy)
    return codes, tables.reshape(rows, *lut.shape[1:])


def decoded_rows(record: SketchRecord, raw: bytes) -> Float32:
    """Rows of a sketch as float32, by the kernels that run the model."""
    codes, tables = split_rows(record, raw)
    if not len(codes):
        return np.zeros((0, record.shape[1]), np.float32)
    if record.shaped:
        from sketchconv.kernels.ggml.expand import expand_rows

        out = np.empty((len(codes), record.shape[1]), np.float32)
        expand_rows(codes, tables.astype(np.float32), record.grid, record.bits, out, 1)
        return out
    return _looked_up(record, codes, tables)


def _looked_up(
    record: SketchRecord, codes: npt.NDArray[np.uint8], tables: npt.NDArray[Any]
) -> Float32:
    import torch

    from sketchconv.kernels.dequantize import decode
    from sketchconv.kernels.packed import Packed

    lut = torch.from_numpy(tables)
    if record.lut_dtype == "BF16":
        lut = lut.view(torch.bfloat16)
    values: Float32 = decode(Packed.of(torch.from_numpy(codes), lut, record.shape[1])).numpy()
    return values
