"""Make a delta: from tuned tables, or from a tuned sketch of the same base."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sketchconv.deltas.binding import BaseBinding
from sketchconv.deltas.summary import DeltaSummary, summary
from sketchconv.deltas.tables import Tables, carried, pairs, refuse_sources, stored_table
from sketchconv.errors import DeltaError, FormatError
from sketchconv.formats.delta_coding import CODES, SAME, Coding, Table
from sketchconv.formats.delta_record import Bound
from sketchconv.formats.delta_writer import DeltaWriter
from sketchconv.formats.document import LIMITS
from sketchconv.formats.manifest import Manifest
from sketchconv.formats.part import as_bytes
from sketchconv.formats.reader import SktchModel
from sketchconv.formats.strict_json import loads
from sketchconv.formats.tensors import carried_to_f32

DTYPES = {"same": SAME, "f16": "F16", "bf16": "BF16", "i8": CODES, "int8": CODES}


def create(
    base: str | os.PathLike[str],
    luts: Tables | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: str = "same",
    mode: str | None = None,
    span: int | None = None,
    task: Mapping[str, Any] | None = None,
    force: bool = False,
) -> DeltaSummary:
    """Write the difference between a sketch and tuned tables of it as a delta.

    Args:
        base: the sketch that was tuned, bundle or folder.
        luts: whole tuned tables `[out, G, 2^bits]` in the base's dtype by the names of their
            weights, as a mapping or as pairs (one is held at a time); or the path of a sketch that
            differs from the base in its tables alone. Weights that are not named do not change.
        output: a file that ends in `.sktch`, or else an adapter folder to make.
        dtype: `"same"` as the base's tables, `"f16"`, `"bf16"`, or `"i8"` (codes with scales).
        mode: `"xor"` (exact, undone without the base; the default for `"same"`), `"replace"` or
            `"add"` (the default for all others).
        span: for `"i8"` how many changed groups share a scale, 1 by default.
        task: free JSON: name, description, data, training. Numbers that the format does not have
            (fractions, negative ones) are stored as their texts. No clock is added.
        force: replace a delta that is there.

    Returns:
        What was written, whether it is exact, and the largest difference from what was asked for.

    Raises:
        DeltaError: a table does not fit the base, or an option does not exist.
        FormatError: the base, or the tuned sketch, breaks a rule; or values leave their range.
        OutputError: the output exists or cannot be written; nothing is left behind.
    """
    coding = coding_of(dtype, mode, span)
    described = plain_task(task or {})
    tuned_path = [luts] if isinstance(luts, str | os.PathLike) else []
    refuse_sources(output, base, *tuned_path)
    with SktchModel.open(base) as model:
        tuned = _tables_of(luts, model)
        with DeltaWriter(output, coding, overwrite=force) as writer:
            return write_delta(writer, model, tuned, described)


def coding_of(dtype: str, mode: str | None, span: int | None) -> Coding:
    """The coding that the options name.

    Raises:
        DeltaError: they name none.
    """
    values = DTYPES.get(dtype.lower())
    if values is None:
        raise DeltaError(f"no value type {dtype!r}; choose from same, f16, bf16, i8")
    default = "xor" if values == SAME else "add"
    width = (1 if span is None else span) if values == CODES else (span or 0)
    coding = Coding(mode or default, values, width)
    try:
        coding.check("delta")
    except FormatError as error:
        raise DeltaError(error.message) from error
    return coding


def write_delta(
    writer: DeltaWriter, model: SktchModel, tuned: Iterator[tuple[str, Any]], task: dict[str, Any]
) -> DeltaSummary:
    """Give every table to a writer, and commit.

    Raises:
        DeltaError: a table does not fit the base.
    """
    from sketchconv import __version__

    binding = BaseBinding.of(model.manifest)
    largest, exact, seen = 0.0, True, set[str]()
    for name, table in tuned:
        bound = _bound(binding, model.manifest, name)
        if name in seen:
            raise DeltaError(f"{name} was given twice")
        seen.add(name)
        wanted = carried(name, table, bound)
        written = writer.add(name, bound, stored_table(model, name), wanted)
        if not np.array_equal(as_bytes(written.tuned), as_bytes(wanted)):
            exact = False
            largest = max(largest, _largest_error(written.tuned, wanted, bound))
    document = writer.commit(described_base(model), task, f"sketchconv {__version__}")
    return summary(document, writer.path, exact, largest)


def described_base(model: SktchModel) -> dict[str, Any]:
    """What a delta says of its base, for people."""
    source = model.manifest.source
    return {key: source.get(key) for key in ("id", "revision", "format", "digest")}


def plain_task(task: Mapping[str, Any]) -> dict[str, Any]:
    """What a delta says of its task, as the format has it; call it before any work.

    Raises:
        DeltaError: it is no JSON, nested too deep, or holds text that is no Unicode.
    """
    try:
        value: dict[str, Any] = _plain_json(task)
        loads(json.dumps({"task": value}).encode("ascii"), "the task", LIMITS)
    except FormatError as error:
        raise DeltaError(f"the task of a delta cannot be written: {error.message}") from None
    except RecursionError:
        raise DeltaError("the task of a delta cannot be written: it is nested too deep") from None
    return value


def _plain_json(value: Any) -> Any:
    """Free JSON in the numbers of the format: others become their texts.

    Raises:
        DeltaError: a value that is no JSON, or a number that is not finite.
    """
    if isinstance(value, Mapping):
        return {str(k): _plain_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_json(v) for v in value]
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int):
        return value if 0 <= value < 2**63 else str(value)
    if isinstance(value, float) and np.isfinite(value):
        return repr(float(value))
    raise DeltaError(f"the task holds {value!r}, which is no JSON of the format")


def _tables_of(
    luts: Tables | str | os.PathLike[str], base: SktchModel
) -> Iterator[tuple[str, Any]]:
    if isinstance(luts, str | os.PathLike):
        return _tables_of_sketch(Path(luts), base)
    return pairs(luts)


def _tables_of_sketch(path: Path, base: SktchModel) -> Iterator[tuple[str, Any]]:
    with SktchModel.open(path) as tuned:
        _check_same_model(base, tuned)
        ours, theirs = base.manifest, tuned.manifest
        for name, record in sorted(ours.sketches.items()):
            if ours.digests[record.lut_name] != theirs.digests[record.lut_name]:
                yield name, stored_table(tuned, name)


def _check_same_model(base: SktchModel, tuned: SktchModel) -> None:
    """Both must be the same in everything but tables; sentinels and files do not count."""
    where = f"{tuned.path.name} is no tuned {base.path.name}"
    ours, theirs = base.manifest, tuned.manifest
    if dict(ours.sketches) != dict(theirs.sketches):
        odd = sorted(set(ours.sketches.items()) ^ set(theirs.sketches.items()), key=str)
        raise DeltaError(f"{where}: the sketch of {odd[0][0]} has another form, or is in one alone")
    if dict(ours.aliases) != dict(theirs.aliases):
        raise DeltaError(f"{where}: their aliases differ")
    tables = {r.lut_name for r in ours.sketches.values()}
    for name in sorted(_own(base) | _own(tuned)):
        if name not in tables and ours.digests.get(name) != theirs.digests.get(name):
            raise DeltaError(
                f"{where}: {name} differs, but a delta holds LUTs alone; tune nothing else"
            )


def _own(model: SktchModel) -> set[str]:
    manifest = model.manifest
    return model.tensors.keys() - set(manifest.files.values()) - manifest.sketches.keys()


def _bound(binding: BaseBinding, manifest: Manifest, name: str) -> Bound:
    bound = binding.weights.get(name)
    if bound is None:
        other = manifest.aliases.get(name)
        hint = f"; it is an alias, give {other}" if other else ""
        raise DeltaError(f"the base has no sketch {name}{hint}")
    return bound


def _largest_error(got: Table, wanted: Table, bound: Bound) -> float:
    pair = (carried_to_f32(got, bound.lut), carried_to_f32(wanted, bound.lut))
    return float(np.abs(pair[0] - pair[1]).max())
