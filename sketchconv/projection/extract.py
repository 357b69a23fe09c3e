"""A full fine-tune as a delta: tuned weights projected on the index maps of a sketch."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sketchconv.calibration.threads import torch_threads
from sketchconv.errors import ProjectionError
from sketchconv.memory import anonymous_bytes, chunk_budget, left_beside
from sketchconv.projection.layers import Projected, check_free, project
from sketchconv.projection.matched import Matched
from sketchconv.projection.metric import Diagonal, Full, Metric
from sketchconv.projection.options import ExtractOptions
from sketchconv.projection.report import ExtractReport, LayerReport
from sketchconv.projection.unheld import Unheld, unheld
from sketchconv.sources.open import open_source
from sketchconv.sources.sketch import SketchSource
from sketchconv.worker import Progress

if TYPE_CHECKING:
    from sketchconv.formats.sketches import SketchRecord
    from sketchconv.projection.moments import GroupMoments

ProgressCallback = Callable[[Progress], None]
# Hidden states beyond this go to disk where no limit is given.
_HIDDEN_IN_MEMORY = 4 << 30
_MIN_TOKENS = 256
# Relative distance of weights that are taken to be strangers; those of two random matrices lie 1.4
# apart, a fine-tune from what it began with 0.01 to 0.1, and a 1-bit sketch 0.6.
_UNRELATED = 0.9


class Extraction:
    """An extraction that was checked from metadata and can start; use it in a `with`.

    Args:
        base: path of the sketch, a `.sktch` file or a folder.
        tuned: the fine-tune: a Hugging Face folder, a hub id or a `.gguf` file.
        dense_base: the dense model that the base was made from, of the same kinds.
        options: how.

    Raises:
        SketchconvError: the models do not belong together; says which tensor. Nothing was read but
            metadata.
    """

    def __init__(
        self,
        base: str | Path,
        tuned: str | Path,
        dense_base: str | Path | None = None,
        options: ExtractOptions | None = None,
    ) -> None:
        self.options = options or ExtractOptions()
        self.target = self.options.resolved(has_dense=dense_base is not None)
        self._stack = ExitStack()
        self._started = time.perf_counter()
        self._layers: dict[str, LayerReport] = {}
        self._changed, self._peak = 0, 0
        self._unheld: tuple[Unheld, ...] = ()
        try:
            self.base = self._stack.enter_context(SketchSource(Path(base)))
            check_free(self.base)
            self._tuned = self._open(tuned, "TUNED")
            self._dense = None if dense_base is None else self._open(dense_base, "the dense base")
            self._budget = chunk_budget(self._limit())
        except BaseException:
            self.close()
            raise

    def _limit(self) -> int | None:
        """Memory that is left beside Hessians: as measured, damped, and one in the making."""
        options = self.options
        if options.calibration is None or options.hessian != "full":
            return options.max_memory
        widest = max(record.shape[1] for record in self.base.records.values())
        return left_beside(
            options.max_memory, 12 * widest**2, "Hessians (--hessian diagonal: none)"
        )

    def _open(self, spec: str | Path, role: str) -> Matched:
        source = open_source(str(spec))
        self._stack.callback(source.close)
        return Matched(source, self.base, role)

    def luts(self, progress: ProgressCallback | None = None) -> Iterator[tuple[str, Tensor]]:
        """Do the work: tuned LUTs, ``[out, groups, 2**bits]`` in the base's dtype, by weight.

        Weights whose LUTs do not change are left out. Call it once.

        Raises:
            ProjectionError: nothing changed; or, if strict, something that a delta cannot hold.
            WeightError: a tuned weight is not finite, or beyond the LUTs' dtype.
            CalibrationError: text and tuned model do not fit.
        """
        with torch_threads(self.options.threads):
            yield from self._luts(progress)

    def _luts(self, progress: ProgressCallback | None) -> Iterator[tuple[str, Tensor]]:
        self._look_beside()
        total = sum(math.prod(record.shape) for record in self.base.records.values())
        done = 0
        for record, metric in self._metrics(progress):
            with torch.no_grad():
                found = self._project(record, metric)
            done += math.prod(record.shape)
            self._layers[record.name] = LayerReport(
                record.name, record.shape, metric.name, found.energies
            )
            self._peak = max(self._peak, anonymous_bytes())
            if progress is not None:
                progress(Progress(record.name, "project", done, total))
            if found.changed:
                self._changed += 1
                yield record.name, found.lut
        if not self._changed:
            raise ProjectionError(self._nothing())

    def report(self) -> ExtractReport:
        """What was done, after `luts` has ended."""
        return ExtractReport(
            self.target,
            self.options.metric_name,
            tuple(self._layers[name] for name in self.base.records if name in self._layers),
            self._unheld,
            self._changed,
            time.perf_counter() - self._started,
            self._peak,
        )

    def close(self) -> None:
        """Close every file."""
        self._stack.close()

    def __enter__(self) -> Extraction:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _look_beside(self) -> None:
        self._unheld = tuple(unheld(self.base, self._tuned))
        if self.options.strict and self._unheld:
            shown = "; ".join(map(str, self._unheld[:5]))
            raise ProjectionError(
                f"{len(self._unheld)} tensors changed that a delta of LUTs cannot hold: {shown}"
                f"{' ...' if len(self._unheld) > 5 else ''}; tune only the linear weights, or "
                "leave out --strict"
            )

    def _project(self, record: SketchRecord, metric: Metric) -> Projected:
        tuned = partial(self._tuned.rows, record.name)
        relative = self.target == "relative" and self._dense is not None
        dense = partial(self._dense.rows, record.name) if relative and self._dense else None
        found = project(self.base, record, tuned, dense, metric, self._budget)
        energies = found.energies
        _check_kin(record.name, "the base sketch", energies.before, energies.tuned)
        if relative:
            _check_kin(record.name, "the dense base", energies.change, energies.start)
        return found

    def _metrics(self, progress: ProgressCallback | None) -> Iterator[tuple[SketchRecord, Metric]]:
        """Every sketched weight with its norm, those that a text tells of first."""
        left = dict(self.base.records)
        if self.options.calibration is not None:
            own = {self._tuned.own_name(name): name for name in left}
            room = (self.options.max_memory or 4 * _HIDDEN_IN_MEMORY) // 4
            with tempfile.TemporaryDirectory(prefix="sketchconv-") as folder:
                for names, metric in self._measured(Path(folder), room, progress):
                    known = [own[name] for name in names if name in own]
                    yield from ((left.pop(name), metric) for name in known if name in left)
        for record in left.values():
            yield record, Diagonal()

    def _measured(
        self, folder: Path, room: int, progress: ProgressCallback | None
    ) -> Iterator[tuple[tuple[str, ...], Metric]]:
        """Norms by the checkpoint's own names of the weights that share them."""
        from sketchconv.calibration.squares import mean_squares
        from sketchconv.projection.moments import group_moments

        calibration, source = self.options.calibration, self._tuned.source
        if calibration is None:
            raise TypeError("no calibration")

        def tick(text: str, done: int, total: int) -> None:
            if progress is not None:
                progress(Progress(text, "measure", done, total))

        if self.options.hessian == "full":
            for group in group_moments(source, calibration, folder, room):
                tick(f"block {group.done}/{group.blocks}", group.done, group.blocks)
                yield group.names, _metric(group)
            return
        found = mean_squares(source, calibration, folder, room, tick)
        for name, squares in found.items():
            yield (name,), Diagonal(torch.from_numpy(squares))

    def _nothing(self) -> str:
        start = "the dense base" if self.target == "relative" else "the base sketch"
        beside = f"; what did change is not sketched: {self._unheld[0]}" if self._unheld else ""
        return f"{self._tuned.source.id}: no LUT would change from {start}{beside}"


def _metric(group: GroupMoments) -> Metric:
    """The full norm, unless too few tokens reached a weight to tell what columns share."""
    columns = group.hessian.shape[0]
    if group.tokens < min(columns, _MIN_TOKENS):
        return Diagonal(group.hessian.diagonal().clone())
    return Full(group.hessian)


def _check_kin(name: str, other: str, apart: float, norm: float) -> None:
    """Refuse weights of two trainings: they lie as far apart as random ones.

    Raises:
        ProjectionError: says how far.
    """
    if norm > 0 and apart > _UNRELATED**2 * norm:
        raise ProjectionError(
            f"{name}: TUNED lies {math.sqrt(apart / norm):.2f} times its norm away from {other}, "
            "as weights do that have nothing in common; give a fine-tune of the model that was "
            "sketched, and the dense model that it began from"
        )
