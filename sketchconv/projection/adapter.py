"""A delta as a low-rank adapter of the dense model: approximate, with what is lost told."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sketchconv.calibration.threads import torch_threads
from sketchconv.errors import ProjectionError, RecipeError
from sketchconv.export.job import check_outputs
from sketchconv.memory import anonymous_bytes
from sketchconv.projection.adapter_files import TYPES, AdapterForm, GgufAdapter, PeftFolder
from sketchconv.projection.adapter_plan import AdapterPlan, plan_adapter
from sketchconv.projection.difference import Difference, overlaid
from sketchconv.projection.low_rank import LowRank, rank_for, truncate
from sketchconv.sources.sketch import SketchSource
from sketchconv.worker import Progress

ProgressCallback = Callable[[Progress], None]
DEFAULT_RANK = 64
DEFAULT_MIN_ENERGY = 0.8


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """A low-rank adapter that was written.

    Attributes:
        files: path and bytes of each.
        rank: of every factor.
        weights: name -> share of the energy of its change that the adapter keeps.
        captured: share of the energy of all changes together.
        seconds: wall time.
        peak_anonymous: most memory seen, in bytes.
    """

    files: tuple[tuple[str, int], ...]
    rank: int
    weights: Mapping[str, float]
    captured: float
    seconds: float
    peak_anonymous: int

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {
            "files": dict(self.files),
            "rank": self.rank,
            "captured": self.captured,
            "weights": dict(self.weights),
            "seconds": round(self.seconds, 3),
            "peak_anonymous": self.peak_anonymous,
        }


def export_lora(
    delta: str | Path,
    base: str | Path,
    out: str | Path,
    *,
    rank: int = DEFAULT_RANK,
    min_energy: float = DEFAULT_MIN_ENERGY,
    dtype: str = "F16",
    force: bool = False,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> AdapterReport:
    """Write the difference that a delta makes as a LoRA adapter of the dense model: approximate.

    A change of LUTs is not of low rank, so each weight keeps the best part of rank `rank`
    (`low_rank.truncate`), and what is lost is told. The adapter is meant for the dense model that
    the base was made from; alpha is the rank, so that its scale is 1. The bytes may depend on
    `threads` in the last bits, as torch's products do.

    Args:
        delta, base: paths of both.
        out: a path that ends in `.gguf` for llama.cpp, else a folder to make for peft.
        rank: of the factors.
        min_energy: least share of the energy of all changes; less is refused.
        dtype: F32, F16 or BF16.
        force: replace a `.gguf` file.
        threads: of torch; all cores by default.
        progress: called after each weight.

    Raises:
        ProjectionError: too little is captured, or a change that an adapter cannot hold.
        DeltaError: the delta was not made for this base.
        SketchconvError: nothing is left behind.
    """
    _check(rank, min_energy, dtype)
    target = Path(out)
    check_outputs(
        target.absolute().parent, {target.name: None}, (Path(base), Path(delta)), force=True
    )
    started = time.perf_counter()
    with ExitStack() as stack:
        tuned = stack.enter_context(overlaid(Path(delta), Path(base)))
        plain = stack.enter_context(SketchSource(Path(base)))
        plan = plan_adapter(tuned, tuned.changed)
        form = _form(target, plan, rank, dtype.upper(), force=force)
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch_threads(threads))
        return _written(target, plan, form, Difference(tuned, plain), rank, min_energy,
                        progress, started)  # fmt: skip


def _check(rank: int, min_energy: float, dtype: str) -> None:
    if rank < 1:
        raise RecipeError(f"the rank must be at least 1, got {rank}")
    if not 0 <= min_energy <= 1:
        raise RecipeError(f"the least energy must be between 0 and 1, got {min_energy}")
    if dtype.upper() not in TYPES:
        raise RecipeError(f"type {dtype!r}: an adapter holds F32, F16 or BF16")


def _form(out: Path, plan: AdapterPlan, rank: int, dtype: str, *, force: bool) -> AdapterForm:
    if out.suffix.lower() == ".gguf":
        return GgufAdapter(out, plan, rank, dtype, force=force)
    return PeftFolder(out, plan, rank, dtype)


def _written(
    out: Path,
    plan: AdapterPlan,
    form: AdapterForm,
    difference: Difference,
    rank: int,
    min_energy: float,
    progress: ProgressCallback | None,
    started: float,
) -> AdapterReport:
    tally = _Tally(rank, min_energy)
    total = sum(math.prod(weight.shape) for weight in plan.weights)
    done, writer = 0, form.open()
    try:
        for weight in plan.weights:
            found = truncate(difference.of(weight.name), rank)
            tally.add(weight.name, found)
            for name, data in form.tensors(weight, found):
                writer.append(name, data)
            done += math.prod(weight.shape)
            if progress is not None:
                progress(Progress(weight.name, "decompose", done, total))
        tally.check()
        writer.commit()
    finally:
        writer.abort()
    parent = out.parent if out.suffix.lower() == ".gguf" else out
    files = tuple((str(parent / name), size) for name, size in form.sizes.items())
    seconds = time.perf_counter() - started
    return AdapterReport(files, rank, tally.shares, tally.captured, seconds, tally.peak)


class _Tally:
    """Energies of the weights so far."""

    def __init__(self, rank: int, least: float) -> None:
        self._rank, self._least = rank, least
        self.shares: dict[str, float] = {}
        self.peak = 0
        self._energies: list[float] = []
        self._kept: list[float] = []
        self._curves: list[Tensor] | None = []

    def add(self, name: str, found: LowRank) -> None:
        """Take in a weight."""
        self._energies.append(found.energy)
        self._kept.append(found.captured)
        self.shares[name] = found.captured / found.energy if found.energy > 0 else 1.0
        if not found.exact:
            self._curves = None
        elif self._curves is not None:
            self._curves.append(found.kept)
        self.peak = max(self.peak, anonymous_bytes())

    @property
    def captured(self) -> float:
        """The share of all energy together; 1 where there is none."""
        total = math.fsum(self._energies)
        return math.fsum(self._kept) / total if total > 0 else 1.0

    def check(self) -> None:
        """Refuse an adapter that would lose too much.

        Raises:
            ProjectionError: tells the share, and the rank that would do where it is known.
        """
        if self.captured >= self._least:
            return
        raise ProjectionError(
            f"an adapter of rank {self._rank} keeps {100 * self.captured:.1f} % of the energy of "
            f"the delta's change, less than {100 * self._least:.1f} %{self._hint()}; export the "
            "merged model with --to gguf or --to safetensors, which are exact, or lower "
            "--min-energy"
        )

    def _hint(self) -> str:
        if self._curves is None:
            return ""
        longest = max(len(curve) for curve in self._curves)
        total = torch.zeros(longest, dtype=torch.float64)
        for curve in self._curves:
            total[: len(curve)] += curve
            total[len(curve) :] += curve[-1]
        gains = torch.cat((total[:1], total.diff()))
        return f" (rank {rank_for(gains, self._least)} would do)"
