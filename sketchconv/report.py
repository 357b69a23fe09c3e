"""What a conversion cost and saved: the value that `convert` returns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sketchconv.plan import Plan, Step

if TYPE_CHECKING:
    from sketchconv.calibration.report import CalibrationReport
    from sketchconv.job import Job


@dataclass(frozen=True, slots=True)
class TensorResult:
    """One sketched weight: its squared error and squared norm, both sums over all weights."""

    name: str
    bits: int
    groups: int
    parameters: int
    squared_error: float
    squared_norm: float

    @property
    def relative_error(self) -> float:
        """Frobenius norm of the error over that of the weight; 0 for an all-zero weight."""
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0


@dataclass(frozen=True, slots=True)
class Costs:
    """What a conversion took; see `Report`."""

    seconds: float
    solve_seconds: float
    compile_seconds: float
    peak_anonymous: int
    jobs: int = 1


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of one conversion; sizes in bytes, times in seconds.

    Args:
        source: identity of the source.
        output: path that was written.
        plan: what was done to every tensor.
        weighting: how the columns were weighted, in words.
        results: one entry per sketched weight.
        source_bytes: tensor bytes in the source, as stored there.
        output_bytes: bytes on disk.
        seconds: wall time of the conversion.
        solve_seconds: wall time inside the solver, added up over the processes.
        compile_seconds: wall time to compile the solver, or to read it from its cache.
        peak_anonymous: highest anonymous memory seen, in bytes; of several processes the sum of
            each one's highest.
        calibration: what it did, where there was one.
        jobs: processes that the work was shared among.
    """

    source: str
    output: str
    plan: Plan
    weighting: str
    results: tuple[TensorResult, ...]
    source_bytes: int
    output_bytes: int
    seconds: float
    solve_seconds: float
    compile_seconds: float
    peak_anonymous: int
    calibration: CalibrationReport | None = None
    jobs: int = 1

    @property
    def parameters(self) -> int:
        """Parameters that the output can rebuild, aliases counted once."""
        return stored_parameters(self.plan.steps)

    @property
    def bits_per_weight(self) -> float:
        """All bytes on disk (LUTs, copies, header, tokenizer) over all parameters."""
        return 8 * self.output_bytes / max(1, self.parameters)

    @property
    def dense_bytes(self) -> int:
        """Size of the same parameters in a 16-bit dtype."""
        return 2 * self.parameters

    @property
    def relative_error(self) -> float:
        """Frobenius norm of all errors over that of all sketched weights."""
        error = math.fsum(r.squared_error for r in self.results)
        norm = math.fsum(r.squared_norm for r in self.results)
        return math.sqrt(error / norm) if norm else 0.0

    @property
    def worst(self) -> TensorResult | None:
        """The sketched weight with the largest relative error."""
        return max(self.results, key=lambda r: r.relative_error, default=None)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values for ``--json``."""
        coverage = self.plan.coverage
        return {
            "source": self.source,
            "output": self.output,
            "weighting": self.weighting,
            "parameters": self.parameters,
            "source_bytes": self.source_bytes,
            "dense_bytes": self.dense_bytes,
            "output_bytes": self.output_bytes,
            "bits_per_weight": self.bits_per_weight,
            "sketched_bits_per_weight": sketched_bits_per_weight(self.plan.steps),
            "coverage": {"sketched": coverage.sketched, "eligible": coverage.eligible},
            "relative_error": self.relative_error,
            "seconds": self.seconds,
            "solve_seconds": self.solve_seconds,
            "compile_seconds": self.compile_seconds,
            "peak_anonymous_bytes": self.peak_anonymous,
            "jobs": self.jobs,
            "calibration": self.calibration.to_json() if self.calibration else None,
            "errors": {r.name: r.relative_error for r in self.results},
            "steps": [step_json(step) for step in self.plan.steps],
        }


def result_of(step: Step, squared_error: float, squared_norm: float) -> TensorResult:
    """The outcome of one sketched weight."""
    record = step.record
    bits, groups = (record.bits, record.groups) if record else (0, 0)
    return TensorResult(step.name, bits, groups, step.parameters, squared_error, squared_norm)


def make_report(
    job: Job,
    results: Sequence[TensorResult],
    costs: Costs,
    calibration: CalibrationReport | None = None,
) -> Report:
    """The report of a job that is done."""
    return Report(
        source=job.source.id,
        output=str(job.output),
        plan=job.plan,
        weighting=job.moments.description,
        results=tuple(results),
        source_bytes=job.source.nbytes,
        output_bytes=job.output_bytes,
        seconds=costs.seconds,
        solve_seconds=costs.solve_seconds,
        compile_seconds=costs.compile_seconds,
        peak_anonymous=costs.peak_anonymous,
        calibration=calibration,
        jobs=costs.jobs,
    )


def stored_parameters(steps: Sequence[Step]) -> int:
    """Parameters in sketched and copied tensors."""
    return sum(step.parameters for step in steps if step.action in ("sketch", "copy"))


def sketched_bits_per_weight(steps: Sequence[Step]) -> float:
    """Stored bits (indices and LUTs) per weight of the sketched tensors; 0 without any."""
    sketched = [step for step in steps if step.action == "sketch"]
    weights = sum(step.parameters for step in sketched)
    return 8 * sum(step.nbytes for step in sketched) / weights if weights else 0.0


def step_json(step: Step) -> Mapping[str, Any]:
    """One step as plain JSON values."""
    sketch = step.record
    return {
        "name": step.name,
        "action": step.action,
        "reason": step.reason,
        "role": step.role,
        "dtype": step.info.dtype,
        "shape": list(step.info.shape),
        "bits": sketch.bits if sketch else None,
        "groups": sketch.groups if sketch else None,
        "bytes": step.nbytes,
    }
