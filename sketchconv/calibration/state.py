"""The state of a calibration on disk: one file per finished block, so that a run can go on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sketchconv.calibration.kept import (
    UNFINISHED,
    kept_metadata,
    read_json,
    save_tensors,
    write_json,
)
from sketchconv.errors import CalibrationError
from sketchconv.formats.part import os_failures

if TYPE_CHECKING:
    from torch import Tensor

    from sketchconv.formats.manifest import SketchRecord

SUFFIX = ".calibration"
RECOVERED = "recovered.safetensors"
OWN_TEXT = "written.safetensors"
_FINGERPRINT = "calibration.json"
_RESULTS = "results"


@dataclass(frozen=True, slots=True)
class WeightResult:
    """What is known of one calibrated weight.

    Args:
        name: of the weight.
        error: its relative output error on held-out tokens, where the method has one.
        damping: that was used, where the method has one.
        notes: fallbacks, in words.
    """

    name: str
    error: float | None
    damping: float | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BlockResult:
    """What is known of one finished block.

    Args:
        digest: SHA-256 of the dense weights that it was made from.
        weights: one entry per calibrated weight.
        skipped: weight -> why it is left to the calibration-free path.
        rebuilt: what its own recovery did, as plain JSON values; None where there was none.
    """

    digest: str
    weights: tuple[WeightResult, ...]
    skipped: Mapping[str, str]
    rebuilt: Mapping[str, Any] | None = None


class CalibrationState:
    """A folder beside the output.

    It is made when the first block is done, and removed when the output is written.

    Args:
        output: the sketch that is being made.
        fingerprint: everything that decides the result, as plain JSON values.

    Raises:
        CalibrationError: the folder holds the state of another calibration.
        OutputError: the disk is full or fails.
    """

    def __init__(self, output: Path, fingerprint: Mapping[str, Any]) -> None:
        self.folder = state_folder(output)
        self._fingerprint = json.loads(json.dumps(fingerprint))
        self._results: dict[int, BlockResult | None] = {}
        file = self.folder / _FINGERPRINT
        check_folder(self.folder)
        if file.exists():
            self._compare(file)
        with os_failures(self.folder):
            self.folder.mkdir(exist_ok=True)
        write_json(file, self._fingerprint)

    def _compare(self, file: Path) -> None:
        old = read_json(file) or {}
        keys = self._fingerprint.keys() | old.keys()
        other = [key for key in sorted(keys) if old.get(key) != self._fingerprint.get(key)]
        if other and any(self.folder.glob("block-*.safetensors")):
            raise CalibrationError(
                f"{self.folder}: the state of another calibration (different: {', '.join(other)});"
                " pass --no-resume to start anew, or repeat that calibration to finish it"
            )

    def file(self, block: int) -> Path:
        """Where a block's weights are kept."""
        return self.folder / f"block-{block:05d}.safetensors"

    def done(self, block: int) -> bool:
        """Whether a block is finished; one whose file is damaged is not."""
        if block not in self._results:
            self._results[block] = _read_result(self.file(block))
        return self._results[block] is not None

    def save(self, block: int, tensors: Mapping[str, Tensor], result: BlockResult) -> None:
        """Keep a finished block: all of it, or nothing.

        Raises:
            OutputError: the disk is full or fails.
        """
        save_tensors(self.file(block), tensors, {_RESULTS: json.dumps(asdict(result))})
        self._results[block] = result

    def result(self, block: int) -> BlockResult:
        """What was kept of a finished block besides its weights.

        Raises:
            CalibrationError: it is not finished.
        """
        found = self._results[block] if self.done(block) else None
        if found is None:
            raise CalibrationError(f"{self.file(block)}: not a finished block; run it again")
        return found

    def tensors(self, block: int, names: Iterable[str]) -> list[Tensor]:
        """Tensors of a finished block."""
        from safetensors import safe_open

        with safe_open(self.file(block), "pt") as file:
            return [file.get_tensor(name) for name in names]

    def remove(self) -> None:
        """Forget everything: the output exists."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _read_result(path: Path) -> BlockResult | None:
    """What a block's file says of it; None if the file is missing or damaged."""
    try:
        values = json.loads((kept_metadata(path) or {})[_RESULTS])
        weights = tuple(
            WeightResult(w["name"], w["error"], w["damping"], tuple(w["notes"]))
            for w in values["weights"]
        )
        return BlockResult(values["digest"], weights, values["skipped"], values["rebuilt"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def state_folder(output: Path) -> Path:
    """Where the state of a calibration lies, beside its output."""
    return output.with_name(output.name + SUFFIX)


def begun(output: Path) -> Mapping[str, Any] | None:
    """The fingerprint of a calibration that was broken off with finished blocks; None without."""
    folder = state_folder(output)
    finished = any(folder.glob("block-*.safetensors"))
    return read_json(folder / _FINGERPRINT) if finished else None


def forget(output: Path) -> None:
    """Drop the state of a calibration, if there is one.

    Raises:
        CalibrationError: the folder holds something else.
    """
    folder = state_folder(output)
    check_folder(folder)
    shutil.rmtree(folder, ignore_errors=True)


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds anything but the state of a calibration.

    Raises:
        CalibrationError: it does.
    """
    ours = any((folder / name).exists() for name in (_FINGERPRINT, OWN_TEXT))
    if not ours and folder.exists() and any(p.suffix != UNFINISHED for p in folder.iterdir()):
        raise CalibrationError(
            f"{folder}: in the way of this calibration's state; move or delete it"
        )


class FinishedWeights:
    """Weights that are already sketched, in safetensors files; later files win.

    Args:
        files: each holds packed indices and LUTs under their stored names.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        from safetensors import safe_open

        self._files: dict[str, Path] = {}
        for path in files:
            with safe_open(path, "pt") as file:
                self._files.update(dict.fromkeys(file.keys(), path))

    def __contains__(self, record: object) -> bool:
        return getattr(record, "index_name", None) in self._files

    def rows(self, record: SketchRecord, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Rows [begin, end) of a weight: uint8 ``[rows, G, bytes]``, LUTs ``[rows, G, 2**b]``."""
        index, lut = (self._slice(n, begin, end) for n in (record.index_name, record.lut_name))
        return index, lut

    def _slice(self, name: str, begin: int, end: int) -> Tensor:
        from safetensors import safe_open

        with safe_open(self._files[name], "pt") as file:
            rows: Tensor = file.get_slice(name)[begin:end]
            return rows.contiguous()
