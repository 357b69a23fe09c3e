"""Tables as arrays: from a sketch, from tensors of torch, from NumPy."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sketchconv.errors import DeltaError, FormatError, OutputError
from sketchconv.formats.delta_coding import Table, finite
from sketchconv.formats.delta_record import Bound
from sketchconv.formats.digest import tensor_digest
from sketchconv.formats.part import as_bytes
from sketchconv.formats.reader import SktchModel
from sketchconv.formats.tensors import DTYPES, TensorInfo

Tables = Mapping[str, Any] | Iterable[tuple[str, Any]]


def pairs(tables: Tables) -> Iterator[tuple[str, Any]]:
    """Names and tables of a mapping or an iterable of pairs."""
    yield from tables.items() if isinstance(tables, Mapping) else tables


def carried(name: str, table: Any, bound: Bound) -> Table:
    """Return a table in the carrier of its dtype: float16, float32, or uint16 for BF16.

    Args:
        name: of the weight, for the error.
        table: `[out, G, K]`: a tensor of torch, or an array (BF16 as uint16 bit patterns).
        bound: the base's table.

    Raises:
        DeltaError: a wrong shape or dtype, or values that are not finite.
    """
    array = _from_torch(table) if hasattr(table, "detach") else table
    carrier = DTYPES[bound.lut].numpy
    if not isinstance(array, np.ndarray) or tuple(array.shape) != bound.shape:
        got = list(array.shape) if isinstance(array, np.ndarray) else type(array).__name__
        raise DeltaError(f"{name}: the base's table is {list(bound.shape)}, got {got}")
    if array.dtype != carrier:
        what = "uint16 bits, or a tensor of torch" if bound.lut == "BF16" else str(carrier)
        raise DeltaError(
            f"{name}: the base's table is {bound.lut} ({what}), got {array.dtype}; convert it"
        )
    count = array.size - int(np.count_nonzero(finite(array, bound.lut)))
    if count:
        raise DeltaError(f"{name}: {count} entries of the table are not finite")
    return array


def stored_table(model: SktchModel, name: str) -> Table:
    """A table of a sketch in its carrier, with its digest checked.

    Raises:
        FormatError: SKT-081 if its bytes have changed, SKT-013.
    """
    record = model.manifest.sketches[name]
    raw = model.read(record.lut_name)
    found, wanted = tensor_digest(record.lut_info, raw), model.manifest.digests[record.lut_name]
    if found != wanted:
        where = f"{model.path.name}: {record.lut_name}"
        raise FormatError("SKT-081", where, f"digest: recorded {wanted}, computed {found}")
    return np.frombuffer(raw, DTYPES[record.lut_dtype].numpy).reshape(record.lut_info.shape)


def table_digest(bound: Bound, table: Table) -> str:
    """The digest that a table has when it is stored."""
    info = TensorInfo("", bound.lut, bound.shape)
    return tensor_digest(info, as_bytes(table))


def refuse_sources(output: str | os.PathLike[str], *sources: str | os.PathLike[str]) -> None:
    """Refuse an output that would replace what is read.

    Raises:
        OutputError: `output` is one of the sources, or lies inside one of them.
    """
    target = Path(output).resolve()
    for source in map(Path, sources):
        if source.resolve() in (target, *target.parents):
            raise OutputError(f"cannot write {output}: it is, or lies inside, {source}, a source")


def _from_torch(tensor: Any) -> Any:
    import torch

    plain = tensor.detach().cpu().contiguous()
    return (plain.view(torch.uint16) if plain.dtype == torch.bfloat16 else plain).numpy()
