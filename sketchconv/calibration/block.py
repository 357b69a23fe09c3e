"""Calibrate one block: gather, solve and replace, stage after stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sketchconv.calibration.fallback import put_fallback
from sketchconv.calibration.gather import Sums
from sketchconv.calibration.linears import put_rows
from sketchconv.calibration.mixtures import in_passes, same_routes, with_siblings
from sketchconv.calibration.shaped import luts_of
from sketchconv.calibration.solve import Solution, solve
from sketchconv.calibration.stages import Group, Stage, find_stages
from sketchconv.calibration.state import WeightResult
from sketchconv.calibration.taps import Tapped, run_tapped
from sketchconv.errors import CalibrationError, SketchconvError, WeightError
from sketchconv.formats.packing import unpack
from sketchconv.kernels.cpu import LutRangeError, pack_rows
from sketchconv.memory import give_back

if TYPE_CHECKING:
    from sketchconv.calibration.methods import Method
    from sketchconv.calibration.state import CalibrationState
    from sketchconv.calibration.streams import Streams
    from sketchconv.calibration.weights import Weights
    from sketchconv.formats.manifest import SketchRecord

_MIN_TOKENS = 256
_ROWS = 1024


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
    """

    index: int
    name: str
    dense: nn.Module
    compressed: nn.Module
    targets: Mapping[str, SketchRecord]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    results: list[WeightResult] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


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
        work.skipped[work.targets[path].name] = "no calibration token reached it"
    for stage in in_passes(stages, {path: r.shape for path, r in work.targets.items()}):
        with same_routes(work.compressed, work.dense, stage):
            sums = _gather(work, stage, streams, needs_pairs=method.asymmetric)
        give_back()
        for group in stage.groups:
            _solve_group(work, group, sums.get(group.linears[0]), weights, method, threads)
        give_back()
        yield [path for group in stage.groups for path in group.linears]


def _gather(
    work: BlockWork, stage: Stage, streams: Streams, *, needs_pairs: bool
) -> dict[str, Sums]:
    """Sums of every group that saw tokens, by the group's first linear."""
    sums: dict[str, Sums] = {}
    for batch in streams.batches():
        call = streams.call(work.index, batch)
        compressed = run_tapped(work.compressed, call, streams.compressed_hidden(batch), stage)
        dense = Tapped()
        if needs_pairs:
            dense = run_tapped(work.dense, call, streams.dense_hidden(batch), stage)
        for group in stage.groups:
            _add(sums, group, dense, compressed, held_out=batch.held_out)
    for path, found in sums.items():
        if not found.finite():
            raise CalibrationError(
                f"{work.name}.{path}: NaN or infinity among its inputs; the model overflows in "
                f"{streams.dtype_name}, or its weights are damaged"
            )
    return sums


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
            work.skipped[work.targets[path].name] = reason
            put_fallback(work.compressed.get_submodule(path), work.targets[path], weights, threads)
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
        put_decoded(work.compressed, target, indices, lut)
        begin = end


def put_finished(
    work: BlockWork, state: CalibrationState, weights: Weights, threads: int | None
) -> None:
    """Give the compressed block the weights that an earlier run left in the state."""
    skipped = state.result(work.index).skipped
    for path, record in work.targets.items():
        if record.name in skipped:
            put_fallback(work.compressed.get_submodule(path), record, weights, threads)
        else:
            found = state.tensors(work.index, (record.index_name, record.lut_name))
            put_tensors(work, path, *found)


def put_tensors(work: BlockWork, path: str, packed: Tensor, lut: Tensor) -> None:
    """Give a module of the compressed block what packed indices and LUTs decode to."""
    record = work.targets[path]
    codes = unpack(packed.numpy(), record.bits, record.group_size).reshape(record.shape)
    put_decoded(work.compressed, Target(path, record), torch.from_numpy(codes), lut)


def put_decoded(block: nn.Module, target: Target, indices: Tensor, lut: Tensor) -> None:
    """Give a linear module the values that a sketch decodes to.

    Args:
        block: that the target is in.
        target: the module.
        indices: uint8 ``[out, in]``.
        lut: ``[out, G, 2**bits]``, or the scales of a shaped sketch.
    """
    module = block.get_submodule(target.path)
    with torch.no_grad():
        for begin in range(0, len(indices), _ROWS):
            part = lut[begin : begin + _ROWS].float()
            if target.record.shaped:
                part = luts_of(part, target.record.grid, target.record.bits)
            codes = indices[begin : begin + _ROWS].view(len(part), part.shape[1], -1).long()
            rows = part.gather(2, codes).view(len(part), -1)
            put_rows(module, begin, rows)
