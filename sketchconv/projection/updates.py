"""Updates of a fine-tune, weight by weight, and what a sketch made on the way keeps of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sketchconv.formats.part import Data
from sketchconv.formats.sketches import SketchRecord
from sketchconv.formats.tensors import TensorInfo
from sketchconv.formats.writer import Results
from sketchconv.job import Job
from sketchconv.kernels.plain import unpack
from sketchconv.memory import DEFAULT_CHUNK_BYTES
from sketchconv.projection.low_rank import spectrum
from sketchconv.projection.matched import Frame, Matched
from sketchconv.projection.metric import Codes, Diagonal
from sketchconv.sources.base import Float32
from sketchconv.sources.matrices import Matrices
from sketchconv.worker import Progress

ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Left:
    """What the best sketch update of a weight leaves, and of which sketch."""

    record: SketchRecord
    energy: float


class Planned(Frame):
    """The plan of a conversion, as the frame of a comparison; and its source's weights."""

    def __init__(self, job: Job) -> None:
        self.id, self._job = job.source.id, job
        self._matrices = Matrices(job.source, job.plan.forms)
        kept = {step.name for step in job.plan.steps if step.action in ("sketch", "copy")}
        self._infos = {n: i for n, i in self._matrices.infos.items() if n in kept}

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Tensors that would be stored."""
        return self._infos

    @property
    def records(self) -> Mapping[str, SketchRecord]:
        """Weights that would be sketched."""
        return {record.name: record for record in self._job.plan.sketches}

    @property
    def aliases(self) -> Mapping[str, str]:
        """Tied weights: absent name -> stored name."""
        return self._job.plan.aliases

    @property
    def origin(self) -> Mapping[str, Any]:
        """As the document of the sketch would say it."""
        return {"format": self._job.source.format, **self._job.plan.forms.to_json()}

    def config(self) -> dict[str, Any]:
        """The source's config."""
        return self._job.source.config()

    def shape(self, name: str) -> tuple[int, int]:
        """``(out, in)`` of a weight."""
        rows, columns = self._infos[name].shape
        return rows, columns

    def rows(self, name: str, begin: int, end: int) -> Float32:
        """Rows of a matrix as float32."""
        raw = self._matrices.rows(name, begin, end)
        return self._matrices.float32(name, raw)


class Update:
    """Rows of tuned weights less those that they came from."""

    def __init__(self, tuned: Matched, dense: Callable[[str, int, int], Any]) -> None:
        self._tuned, self._dense = tuned, dense

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """float32 ``[rows, columns]``."""
        return torch.from_numpy(self._tuned.rows(name, begin, end) - self._dense(name, begin, end))

    def spectra(
        self, shapes: Mapping[str, tuple[int, int]], progress: ProgressCallback | None
    ) -> dict[str, tuple[Tensor, float]]:
        """Squared singular values of every update, and the energy of what it came from."""
        found, done, total = {}, 0, sum(map(math.prod, shapes.values()))
        for name, (rows, columns) in shapes.items():
            change, energies = torch.empty(rows, columns), []
            step = max(1, DEFAULT_CHUNK_BYTES // (16 * columns))
            for begin in range(0, rows, step):
                end = min(begin + step, rows)
                old = self._dense(name, begin, end)
                energies.append(float(np.square(old, dtype=np.float64).sum()))
                change[begin:end] = torch.from_numpy(self._tuned.rows(name, begin, end) - old)
            found[name] = spectrum(change), math.fsum(energies)
            done += rows * columns
            if progress is not None:
                progress(Progress(name, "decompose", done, total))
        return found


class Judge:
    """Takes the place of a writer: measures on each weight's codes, and keeps nothing."""

    def __init__(self, records: Sequence[SketchRecord], update: Update) -> None:
        self._records = {record.index_name: record for record in records}
        self._update, self._seen = update, dict.fromkeys(self._records, 0)
        self._left: dict[str, list[float]] = {record.name: [] for record in records}

    def append(self, name: str, data: Data) -> None:
        """Packed indices of the next rows; all else is passed over."""
        record = self._records.get(name)
        if record is None:
            return
        packed = torch.from_numpy(np.asarray(data))
        begin = self._seen[name]
        self._seen[name] = begin + len(packed)
        codes = unpack(packed, record.bits, record.group_size).flatten(1)
        change = self._update.rows(record.name, begin, self._seen[name])
        maps = Codes(codes, record.groups, 1 << record.bits)
        self._left[record.name].append(left_of(maps, change))

    def commit(self, results: Results) -> None:
        """Nothing was written."""

    def abort(self) -> None:
        """Nothing was written."""

    @property
    def left(self) -> dict[str, Left]:
        """By weight."""
        return {r.name: Left(r, math.fsum(self._left[r.name])) for r in self._records.values()}


def left_of(codes: Codes, change: Tensor) -> float:
    """``|D - S x|^2`` of some rows."""
    metric = Diagonal()
    return metric.energy(change - codes.spread(metric.solve(codes, change)))
