"""Verification of a delta: every rule and digest; with its base, every result too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sketchconv.deltas.binding import BaseBinding, needs
from sketchconv.errors import DeltaError, FormatError
from sketchconv.formats.delta import DeltaFile
from sketchconv.formats.delta_validate import validate_delta
from sketchconv.formats.reader import SktchModel
from sketchconv.formats.validate import Finding

if TYPE_CHECKING:
    from sketchconv.verify import Verification


def verify_delta(
    path: Path, base: str | None, progress: Callable[[int, int], None] | None
) -> Verification:
    """Check a delta, all of it; optionally against its base.

    Args:
        path: the delta, file or folder.
        base: a sketch to compare its binding with, and to compute every tuned table from.
        progress: called with the bytes that were digested and the bytes in all.

    Raises:
        FormatError, OSError: the base cannot be read.
    """
    from sketchconv.verify import Verification

    findings = list(validate_delta(path, progress))
    compared = [0]
    if base is not None and not findings:
        findings += _against(path, base, compared)
    tensors, nbytes = _extent(path)
    return Verification(str(path), tuple(findings), tensors, nbytes, base, compared[0], None)


def _against(path: Path, base: str, compared: list[int]) -> Iterator[Finding]:
    from sketchconv.deltas.resolving import tuned_table
    from sketchconv.deltas.tables import stored_table

    with DeltaFile.open(path) as delta, SktchModel.open(base) as model:
        misfits = list(needs(delta).misfits(BaseBinding.of(model.manifest)))
        yield from (Finding("DLT-040", name, why) for name, why in misfits)
        if misfits:
            return
        for name in sorted(delta.document.weights):
            try:
                compared[0] += tuned_table(delta, name, stored_table(model, name)).size
            except FormatError as error:
                yield Finding(error.requirement, error.where, error.message)
            except DeltaError as error:
                yield Finding("DLT-042", name, str(error))


def _extent(path: Path) -> tuple[int, int]:
    try:
        with DeltaFile.open(path) as delta:
            infos = delta.document.infos().values()
            return len(infos), sum(info.nbytes for info in infos)
    except FormatError:
        return 0, 0
