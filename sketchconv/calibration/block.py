"""Calibrate one block: gather, solve and replace, stage after stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sketchconv.calibration.fallback import put_fallback
from sketchconv.calibration.gather import Sums
from sketchconv.calibration.mixtures import in_passes, same_routes, with_siblings
from sketchconv.calibration.placing import put_decoded
from sketchconv.calibration.shortcuts import Kept
from sketchconv.calibration.solve import Solution, solve
from sketchconv.calibration.stages import Group, Stage, find_stages
from sketchconv.calibration.state import WeightResult
from sketchconv.calibration.taps import Tapped, run_tapped
from sketchconv.errors import CalibrationError, SketchconvError, WeightError
from sketchconv.kernels.cpu import LutRangeError, pack_rows
from sketchconv.memory import give_back

if TYPE_CHECKING:
    from sketchconv.calibration.methods import Method
    from sketchconv.calibration.streams import Batch, Streams
    from sketchconv.calibration.weights import Weights
    from sketchconv.formats.manifest import SketchRecord

_MIN_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Target:
    """A linear module of a block that is to be sketched: its path in the block, its record."""

    path: str
    record: SketchRecord


@dataclass
class BlockWork:
    """One block at work: both versions of it, and what has come of it so far.

    Attributes:
        index: number of the block.
        name: its path in the model, for messages.
        dense, compressed: the block as it was, and as it becomes.
        tensors: packed indices and LUTs under their stored names.
        results: one entry per finished weight.
        skipped: weight -> why it stays calibration-free.
        kept: what spares passes over the block to run all of it.
    """

    index: int
    name: str
    dense: nn.Module
    compressed: nn.Module
    targets: Mapping[str, SketchRecord]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    results: list[WeightResult] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    kept: Kept | None = None


def calibrate_block(
    work: BlockWork, streams: Streams, weights: Weights, method: Method, threads: int | None
) -> Iterator[list[str]]:
    """Sketch every target of a block, and put the decoded weights into `work.compressed`.

    Yields:
        The paths of each stage's modules when it is done.

    Raises:
        CalibrationError: activations are not finite.
        WeightError: a weight cannot be sketched.
    """
    call, hidden = streams.sample(work.index)
    found = find_stages(work.dense, call, hidden, list(work.targets))
    stages, unseen = with_siblings(*found)
    for path in unseen:
        # Other batches may reach it, and a run that goes on finds these values in its place.
        _leave_to_writer(work, path, "no calibration token reached it", weights, threads)
    stages = in_passes(stages, {path: r.shape for path, r in work.targets.items()})
    work.kept = streams.kept(work.index, work.dense, stages)
    for stage in stages:
        with same_routes(work.compressed, work.dense, stage):
            sums = _gather(work, stage, streams, needs_pairs=method.asymmetric)
        give_back()
        for group in stage.groups:
            _solve_group(work, group, sums.get(group.linears[0]), weights, method, threads)
        give_back()
        yield [path for group in stage.groups for path in group.linears]


def _leave_to_writer(
    work: BlockWork, path: str, reason: str, weights: Weights, threads: int | None
) -> None:
    """Have a weight fitted without data; the compressed block computes with the like meanwhile."""
    record = work.targets[path]
    work.skipped[record.name] = reason
    put_fallback(work.compressed.get_submodule(path), record, weights, threads)


def _gather(
    work: BlockWork, stage: Stage, streams: Streams, *, needs_pairs: bool
) -> dict[str, Sums]:
    """Sums of every group that saw tokens, by the group's first linear."""
    sums: dict[str, Sums] = {}
    for batch in streams.batches():
        _gather_batch(work, stage, streams, batch, sums, needs_pairs=needs_pairs)
    for path, found in sums.items():
        if not found.finite():
            raise CalibrationError(
                f"{work.name}.{path}: NaN or infinity among its inputs; the model overflows in "
                f"{streams.dtype_name}, or its weights are damaged"
            )
    return sums


def _gather_batch(
    work: BlockWork,
    stage: Stage,
    streams: Streams,
    batch: Batch,
    sums: dict[str, Sums],
    *,
    needs_pairs: bool,
) -> None:
    """Add one batch to the sums. Of what it saw nothing outlives it, into the next one's passes."""
    compressed = _tapped(work, stage, streams, batch, "compressed")
    dense = _tapped(work, stage, streams, batch, "dense") if needs_pairs else Tapped()
    for group in stage.groups:
        _add(sums, group, dense, compressed, held_out=batch.held_out)


def _tapped(
    work: BlockWork,
    stage: Stage,
    streams: Streams,
    batch: Batch,
    which: Literal["dense", "compressed"],
) -> Tapped:
    """One pass of one of the two blocks over a batch, up to a stage."""
    block = work.dense if which == "dense" else work.compressed
    read = streams.dense_hidden if which == "dense" else streams.compressed_hidden
    call, kept = streams.call(work.index, batch), work.kept
    if kept is None:
        return run_tapped(block, call, read(batch), stage)
    with kept.spared(block, which, batch.begin, batch.end):
        found = run_tapped(block, call, read(batch), stage)
    if stage is kept.shortcut.stage:
        kept.put(which, batch.begin, found.inputs[kept.shortcut.linear], batch.end - batch.begin)
    return found


def _add(
    sums: dict[str, Sums], group: Group, dense: Tapped, compressed: Tapped, *, held_out: bool
) -> None:
    first = group.linears[0]
    inputs = compressed.inputs.get(first)
    if inputs is None:
        return
    tap = next(iter(group.residual.values()), None)
    residual = None
    if tap is not None and tap in dense.residual and tap in compressed.residual:
        residual = (dense.residual[tap], compressed.residual[tap])
    if first not in sums:
        rows = None if residual is None else residual[0].shape[-1]
        sums[first] = Sums(inputs.shape[-1], rows, inputs.device)
    sums[first].add(inputs, dense.inputs.get(first), residual, held_out=held_out)


def _solve_group(
    work: BlockWork,
    group: Group,
    sums: Sums | None,
    weights: Weights,
    method: Method,
    threads: int | None,
) -> None:
    """Solve weights of the same inputs; those of one form together, since rows are independent."""
    columns = work.targets[group.linears[0]].shape[1]
    tokens = 0 if sums is None else sums.tokens
    if sums is None or tokens < min(columns, _MIN_TOKENS):
        for path in group.linears:
            reason = f"only {tokens} calibration tokens reached it"
            _leave_to_writer(work, path, reason, weights, threads)
        return
    together: dict[tuple[Any, ...], list[Target]] = {}
    for path in group.linears:
        record = work.targets[path]
        # A weight that writes into the residual stream has a target of its own.
        alone = path if path in group.residual else None
        key = (record.bits, record.groups, record.lut_dtype, record.grid, alone)
        together.setdefault(key, []).append(Target(path, record))
    for targets in together.values():
        statistics = sums.statistics(residual=targets[0].path in group.residual)
        dense = [weights.float32(t.record.name).to(weights.device) for t in targets]
        solution = _solve(torch.cat(dense), targets, method, statistics, threads)
        _keep(work, targets, solution, threads)


def _solve(
    weight: Tensor, targets: Sequence[Target], method: Method, statistics: Any, threads: int | None
) -> Solution:
    record = targets[0].record
    names = ", ".join(target.record.name for target in targets)
    try:
        return solve(
            weight,
            record.bits,
            record.groups,
            record.lut_dtype,
            method,
            statistics,
            threads=threads,
            grid=record.grid,
        )
    except LutRangeError as error:
        raise WeightError(
            f"{names}: {error.value:g} is beyond the range of a {error.lut_dtype} LUT; choose "
            "--lut-dtype BF16 or F32"
        ) from None
    except SketchconvError as error:
        raise type(error)(f"{names}: {error}") from error


def _keep(
    work: BlockWork, targets: Sequence[Target], solution: Solution, threads: int | None
) -> None:
    begin = 0
    for target in targets:
        record = target.record
        end = begin + record.shape[0]
        indices, lut = solution.indices[begin:end], solution.lut[begin:end].contiguous()
        packed = pack_rows(
            np.ascontiguousarray(indices.numpy()), record.bits, record.groups, threads=threads
        )
        work.tensors[record.index_name] = torch.from_numpy(packed)
        work.tensors[record.lut_name] = lut
        work.results.append(
            WeightResult(record.name, solution.error, solution.damping, solution.notes)
        )
        put_decoded(work.compressed, target.path, record, indices, lut)
        begin = end
