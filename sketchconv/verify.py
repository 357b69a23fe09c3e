"""Verification: every rule and digest of a sketch, and its errors against the source."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sketchconv.errors import FormatError, SourceError

if TYPE_CHECKING:
    from sketchconv.formats.reader import SktchModel
    from sketchconv.formats.sketches import SketchRecord
    from sketchconv.formats.validate import Finding
    from sketchconv.sources.base import Source

_CHUNK_WEIGHTS = 1 << 24
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
        yield f"{verdict} {self.path}: {len(self.findings)} findings"
        yield f"checked {self.tensors} tensors, {self.nbytes:,} bytes, and every rule of the format"
        if self.against is not None:
            error = "none" if self.relative_error is None else f"{self.relative_error:.5f}"
            yield (
                f"compared {self.compared:,} weights with {self.against}: relative error {error}"
            )

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
    path: str | Path, *, against: str | None = None, revision: str | None = None
) -> Verification:
    """Check a sketch, all of it; optionally against the source that it was made from.

    Args:
        path: a `.sktch` file or a sketch folder.
        against: source (folder, hub id or GGUF) whose weights to compare with.
        revision: the source's revision on the Hub.

    Raises:
        SourceError: nothing is there, or `against` cannot be read.
    """
    from sketchconv.formats.validate import validate

    path = Path(path)
    if not path.exists():
        raise SourceError(f"{path}: no such file or folder")
    findings = list(validate(path))
    tensors, nbytes = _extent(path)
    comparison = _Comparison()
    if against is not None and not findings:
        findings += _compare(path, against, revision, comparison)
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
    path: Path, against: str, revision: str | None, comparison: _Comparison
) -> Iterator[Finding]:
    from sketchconv.formats.reader import SktchModel
    from sketchconv.sources.open import open_source

    source = open_source(against, revision=revision)
    try:
        with SktchModel.open(path) as model:
            for record in model.manifest.sketches.values():
                yield from _compare_sketch(model, source, record, comparison)
            yield from _compare_copies(model, source)
    finally:
        source.close()


def _compare_sketch(
    model: SktchModel, source: Source, record: SketchRecord, comparison: _Comparison
) -> Iterator[Finding]:
    import numpy as np

    from sketchconv.formats.validate import Finding

    info = source.infos.get(record.name)
    if info is None or info.shape != record.shape:
        found = "no such tensor" if info is None else f"shape {list(info.shape)}"
        yield Finding("SOURCE", record.name, f"expected {list(record.shape)}, got {found}")
        return
    decoded = model.decode(record.name)
    rows, columns = record.shape
    step = max(1, _CHUNK_WEIGHTS // columns)
    error, norm = [], []
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        dense = source.float32(record.name, source.rows(record.name, begin, end)).astype(np.float64)
        error.append(float(((dense - decoded[begin:end]) ** 2).sum()))
        norm.append(float((dense**2).sum()))
    comparison.weights += rows * columns
    comparison.error += error
    comparison.norm += norm
    total = math.fsum(norm)
    measured = math.sqrt(math.fsum(error) / total) if total else 0.0
    recorded = model.manifest.errors[record.name]
    if recorded is not None and not math.isclose(
        measured, recorded, rel_tol=_ERROR_TOLERANCE, abs_tol=1e-12
    ):
        yield Finding(
            "SOURCE",
            record.name,
            f"relative error {measured:.6e} against the source, {recorded:.6e} is recorded",
        )


def _compare_copies(model: SktchModel, source: Source) -> Iterator[Finding]:
    from sketchconv.formats.validate import Finding

    manifest = model.manifest
    parts = {n for r in manifest.sketches.values() for n in (r.index_name, r.lut_name)}
    skipped = parts | set(manifest.files.values()) | {manifest.sentinel}
    for name, info in model.tensors.items():
        if name in skipped:
            continue
        other = source.infos.get(name)
        if other is None or (other.dtype, other.shape) != (info.dtype, info.shape):
            yield Finding("SOURCE", name, "the source has no such tensor of this dtype and shape")
            continue
        rows = info.shape[0] if info.shape else 1
        if model.read(name) != source.stored(name, source.rows(name, 0, rows)):
            yield Finding("SOURCE", name, "the copy differs from the source")
