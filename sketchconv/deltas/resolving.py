"""The whole tuned tables that a delta stands for, after its base was checked."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sketchconv.deltas.binding import check_fit
from sketchconv.deltas.tables import carried, stored_table, table_digest
from sketchconv.errors import DeltaError, FormatError
from sketchconv.formats.delta import DeltaFile
from sketchconv.formats.delta_coding import Table
from sketchconv.formats.reader import SktchModel


def resolve(
    delta_path: str | os.PathLike[str],
    base: str | os.PathLike[str] | Mapping[str, Any],
    *,
    check: bool = True,
) -> dict[str, Table]:
    """Return the whole tuned table of every weight that a delta changes.

    Args:
        delta_path: a delta, file or folder.
        base: the sketch that it was made for, bundle or folder; or the base's own tables by the
            names of their weights (arrays, or tensors of torch), of which only the digests of the
            tables can be checked: check the indices with `binding_of` and `BaseBinding.require`.
        check: compare the digests of the base; False where the caller has done so. Results are
            compared with their recorded digests in any case.

    Returns:
        Arrays `[out, G, 2^bits]` (of a shaped sketch its scales, `[out, G, fields]`) in the
        carrier of the base's dtype: float16, float32, or uint16 bit patterns for BF16.

    Raises:
        DeltaError: the delta was not made for this base, or its data is damaged.
        FormatError: one of the files breaks a rule of its format.
        OSError: one of them cannot be read.
    """
    with DeltaFile.open(delta_path) as delta:
        if isinstance(base, Mapping):
            return {name: _from_table(delta, name, base, check) for name in delta.document.weights}
        with SktchModel.open(base) as model:
            if check:
                check_fit(delta, model)
            return dict(tuned_tables(delta, model))


def tuned_tables(delta: DeltaFile, model: SktchModel) -> Iterator[tuple[str, Table]]:
    """Each weight of a delta with its tuned table, one in memory at a time.

    Raises:
        DeltaError: the base has no such weight, or the result is not the recorded one.
    """
    for name in delta.document.weights:
        if name not in model.manifest.sketches:
            raise DeltaError(f"{delta.path.name}: the base has no sketch {name}")
        yield name, tuned_table(delta, name, stored_table(model, name))


def tuned_table(delta: DeltaFile, name: str, table: Table) -> Table:
    """One tuned table.

    Raises:
        DeltaError: `table` has another shape or dtype, or the result is not the recorded one.
    """
    try:
        return delta.tuned(name, table)
    except ValueError as error:
        raise DeltaError(f"{delta.path.name}: {error}") from error
    except FormatError as error:
        if error.requirement != "DLT-042":
            raise
        text = "the delta or its base is damaged, or they do not belong together"
        raise DeltaError(f"{error}: {text}") from error


def _from_table(delta: DeltaFile, name: str, tables: Mapping[str, Any], check: bool) -> Table:
    if name not in tables:
        raise DeltaError(f"{Path(delta.path).name}: the base has no table of {name}")
    bound = delta.document.weights[name].bound
    table = carried(name, tables[name], bound)
    if check and table_digest(bound, table) != bound.base:
        raise DeltaError(
            f"{Path(delta.path).name} was not made for these tables: {name} has another digest"
        )
    return tuned_table(delta, name, table)
