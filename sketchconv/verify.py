"""Verification: every rule and digest of a sketch, and its errors against the source."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sketchconv.errors import FormatError, SourceError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from sketchconv.formats.reader import SktchModel
    from sketchconv.formats.sketches import SketchRecord
    from sketchconv.formats.tensors import TensorInfo
    from sketchconv.formats.validate import Finding
    from sketchconv.sources.base import Source
    from sketchconv.sources.matrices import Matrices

_CHUNK_WEIGHTS = 1 << 22
# Recorded errors have seven significant digits.
_ERROR_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Verification:
    """Findings, and what was checked: tensors and bytes digested, weights compared."""

    path: str
    findings: tuple[Finding, ...]
    tensors: int
    nbytes: int
    against: str | None
    compared: int
    relative_error: float | None

    def lines(self) -> Iterator[str]:
        """The result in words."""
        verdict = "FAILED" if self.findings else "OK"
        count = len(self.findings)
        yield f"{verdict} {self.path}: {count} finding{'' if count == 1 else 's'}"
        if not self.tensors:
            yield "stopped at the header or the document: no tensor was checked"
            return
        yield f"checked {self.tensors} tensors, {self.nbytes:,} bytes, and every rule of the format"
        if self.against is not None:
            error = self.relative_error
            shown = "" if error is None else f": relative error {error:.5f}"
            yield f"compared {self.compared:,} weights with {self.against}{shown}"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values for ``--json``."""
        return {
            "path": self.path,
            "ok": not self.findings,
            "findings": [
                {"requirement": f.requirement, "where": f.where, "message": f.message}
                for f in self.findings
            ],
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "against": self.against,
            "compared_weights": self.compared,
            "relative_error": self.relative_error,
        }


def verify(
    path: str | Path,
    *,
    against: str | None = None,
    revision: str | None = None,
    base: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Check a sketch, all of it; optionally against the source that it was made from.

    Args:
        path: a `.sktch` file or a sketch folder; or a delta, file or folder.
        against: source (folder, hub id or GGUF) whose weights to compare with; of a delta its base.
        revision: the source's revision on the Hub.
        base: of a source that another project quantized: the folder of its base model.
        progress: called with the bytes that were digested and the bytes in all.

    Raises:
        SourceError: nothing is there, or `against` cannot be read.
    """
    from sketchconv.deltas.checking import verify_delta
    from sketchconv.formats.delta import is_delta
    from sketchconv.formats.validate import validate

    path = Path(path)
    if not path.exists():
        raise SourceError(f"{path}: no such file or folder")
    if is_delta(path):
        return verify_delta(path, against, progress)
    findings = list(validate(path, progress))
    tensors, nbytes = _extent(path)
    comparison = _Comparison()
    if against is not None and not findings:
        findings += _compare(path, against, revision, base, comparison)
    return Verification(
        str(path),
        tuple(findings),
        tensors,
        nbytes,
        against,
        comparison.weights,
        comparison.relative_error,
    )


def _extent(path: Path) -> tuple[int, int]:
    """Number of stored tensors and their bytes; zeros if the header is not even readable."""
    from sketchconv.formats.reader import SktchModel

    try:
        with SktchModel.open(path) as model:
            return len(model.tensors), sum(info.nbytes for info in model.tensors.values())
    except FormatError:
        return 0, 0


class _Comparison:
    """Sums over all sketched weights that were compared."""

    def __init__(self) -> None:
        self.weights = 0
        self.error: list[float] = []
        self.norm: list[float] = []

    @property
    def relative_error(self) -> float | None:
        norm = math.fsum(self.norm)
        return math.sqrt(math.fsum(self.error) / norm) if norm else None


def _compare(
    path: Path,
    against: str,
    revision: str | None,
    base: Path | None,
    comparison: _Comparison,
) -> Iterator[Finding]:
    from sketchconv.formats.reader import SktchModel
    from sketchconv.importers.base import ImportOptions
    from sketchconv.ready import recorded_bits
    from sketchconv.sources.forms import Forms
    from sketchconv.sources.matrices import Matrices
    from sketchconv.sources.open import open_source

    with SktchModel.open(path) as model:
        manifest = model.manifest
        imports = ImportOptions(base, recorded_bits(manifest.recipe))
        source = open_source(against, revision=revision, imports=imports)
        try:
            matrices = Matrices(source, Forms.of(manifest.source, manifest.sketches, path.name))
            for record in manifest.sketches.values():
                yield from _compare_sketch(model, matrices, record, comparison)
            yield from _compare_copies(model, source)
            yield from _compare_names(model, source, matrices)
        finally:
            source.close()


def _compare_sketch(
    model: SktchModel, source: Matrices, record: SketchRecord, comparison: _Comparison
) -> Iterator[Finding]:
    import numpy as np

    info = source.infos.get(record.name)
    if info is None or info.shape != record.shape:
        found = "no such tensor" if info is None else f"shape {list(info.shape)}"
        yield _finding(record.name, f"expected {list(record.shape)}, got {found}")
        return
    error, norm = [], []
    for begin, end in _spans(record.shape):
        dense = source.float32(record.name, source.rows(record.name, begin, end)).astype(np.float64)
        error.append(float(((dense - _decoded(model, record, begin, end)) ** 2).sum()))
        norm.append(float((dense**2).sum()))
    comparison.weights += record.shape[0] * record.shape[1]
    comparison.error += error
    comparison.norm += norm
    total = math.fsum(norm)
    measured = math.sqrt(math.fsum(error) / total) if total else 0.0
    recorded = model.manifest.errors[record.name]
    if recorded is not None and not math.isclose(
        measured, recorded, rel_tol=_ERROR_TOLERANCE, abs_tol=1e-12
    ):
        text = f"relative error {measured:.6e} against the source, {recorded:.6e} is recorded"
        yield _finding(record.name, text)


def _decoded(
    model: SktchModel, record: SketchRecord, begin: int, end: int
) -> npt.NDArray[np.float32]:
    """Rows [begin, end) of a sketched weight, without reading the others."""
    import numpy as np

    from sketchconv.formats.decode import SketchTensor
    from sketchconv.formats.packing import unpack
    from sketchconv.formats.tensors import DTYPES

    def part(info: TensorInfo) -> npt.NDArray[Any]:
        size = info.nbytes // info.shape[0]
        raw = model.read(info.name, begin * size, end * size)
        return np.frombuffer(raw, DTYPES[info.dtype].numpy).reshape(end - begin, *info.shape[1:])

    codes = unpack(part(record.index_info), record.bits, record.group_size)
    lut = part(record.lut_info)
    codes = codes.reshape(end - begin, -1)
    return SketchTensor(codes, lut, record.bits, record.lut_dtype, record.grid).decode()


def _compare_copies(model: SktchModel, source: Source) -> Iterator[Finding]:
    manifest = model.manifest
    parts = {n for r in manifest.sketches.values() for n in (r.index_name, r.lut_name)}
    # A sketch's own name is that of a sentinel; every shard may have one.
    skipped = parts | set(manifest.files.values()) | set(manifest.sketches)
    for name, info in model.tensors.items():
        if name in skipped:
            continue
        other = source.infos.get(name)
        if other is None or (other.dtype, other.shape) != (info.dtype, info.shape):
            yield _finding(name, "the source has no such tensor of this dtype and shape")
            continue
        size = info.nbytes // info.shape[0] if info.shape else info.nbytes
        for begin, end in _spans(info.shape):
            raw = source.stored(name, source.rows(name, begin, end))
            if model.read(name, begin * size, end * size) != raw:
                yield _finding(name, "the copy differs from the source")
                break


def _compare_names(model: SktchModel, source: Source, matrices: Matrices) -> Iterator[Finding]:
    """What the source has and the sketch does not: aliases must be equal, the rest was dropped."""
    from sketchconv.job import same_bytes

    manifest = model.manifest
    dropped = manifest.recipe.get("dropped", [])
    for name in matrices.infos:
        if name in manifest.aliases:
            target = manifest.aliases[name]
            if target in source.infos and not same_bytes(source, name, target):
                yield _finding(name, f"is an alias of {target} here, but differs in the source")
        elif name not in manifest.sketches and name not in model.tensors and name not in dropped:
            yield _finding(name, "the source has this tensor, the sketch does not")


def _finding(where: str, message: str) -> Finding:
    from sketchconv.formats.validate import Finding

    return Finding("SOURCE", where, message)


def _spans(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Runs of whole rows that cover a tensor in bounded pieces; a scalar has one row."""
    rows = shape[0] if shape else 1
    step = max(1, _CHUNK_WEIGHTS // max(1, math.prod(shape[1:])))
    return ((begin, min(begin + step, rows)) for begin in range(0, rows, step))
