"""The calibration run: every block of a model in turn, with a state that a later run takes up."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from sketchconv.calibration.options import Calibration
from sketchconv.calibration.report import CalibrationReport, make_report, not_run
from sketchconv.calibration.threads import torch_threads
from sketchconv.memory import give_back, give_back_at_once, watched_peak

if TYPE_CHECKING:
    from torch import Tensor

    from sketchconv.calibration.block import BlockWork
    from sketchconv.calibration.setting import Setting
    from sketchconv.calibration.state import BlockResult, CalibrationState, FinishedWeights
    from sketchconv.calibration.streams import Streams
    from sketchconv.calibration.teacher import Teacher
    from sketchconv.job import Job

__all__ = ["Calibrated", "Calibration", "calibrate", "torch_threads"]

# (what is at work, weights done, weights in all)
Tick = Callable[[str, int, int], None]
# Hidden states beyond this go to disk where no limit is given.
_HIDDEN_IN_MEMORY = 4 << 30


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What a calibration leaves for the writer, and for the recovery.

    Attributes:
        state: the folder, to be removed when the output exists.
        report: for the user.
        windows: int64 ``[n, short]``, the token ids to recover on.
        recover: tokens that the whole model is still to be recovered on.
    """

    state: CalibrationState
    report: CalibrationReport
    windows: Tensor
    recover: int = 0

    def weights(self) -> FinishedWeights:
        """The finished weights, recovered LUTs included."""
        from sketchconv.calibration.state import RECOVERED, FinishedWeights

        blocks = sorted(self.state.folder.glob("block-*.safetensors"))
        return FinishedWeights([*blocks, *self.state.folder.glob(RECOVERED)])


def calibrate(
    job: Job,
    *,
    recover: int,
    threads: int | None = None,
    tick: Tick | None = None,
    writing: Tick | None = None,
) -> Calibrated:
    """Sketch the weights of all blocks by a calibrated method, into a state folder.

    A run that was broken off goes on where it stopped.

    Args:
        job: with a calibration.
        recover: tokens to recover on, in each block or, afterwards, in the whole model: then the
            dense model's final hidden states are kept.
        threads: of torch and of the solver; the same number gives the same bytes.
        tick: called after each stage of a block.
        writing: called while the model writes its own text, with tokens in place of weights.

    Raises:
        CalibrationError: the text, the model, the device or an older state do not fit.
        WeightError: a weight cannot be sketched.
    """
    import torch

    from sketchconv.calibration.needs import check_memory
    from sketchconv.calibration.setting import fingerprint, make_setting
    from sketchconv.calibration.state import RECOVERED, CalibrationState
    from sketchconv.calibration.ways import choose_way

    started = time.perf_counter()
    if job.calibration is None:
        raise TypeError("the job has no calibration")
    with torch.no_grad(), torch_threads(threads):
        setting = make_setting(job, job.calibration, recover, writing)
        if job.max_memory is not None:
            give_back_at_once()
        check_memory(setting, job.max_memory)
        way = choose_way(job, setting, recover)
        state = CalibrationState(job.output, fingerprint(job, setting, way.blocks))
        # Of a run that was broken off later: it would be the start of this one's recovery.
        (state.folder / RECOVERED).unlink(missing_ok=True)
        run = _Run(job, setting, state, threads, tick)
        with watched_peak() as peak:
            try:
                run.blocks(teach=bool(way.model), rebuilt=way.blocks)
            finally:
                run.close()
    report = run.report(time.perf_counter() - started, peak())
    if way.note:
        report = replace(report, recovery=not_run(way.note))
    return Calibrated(state, report, setting.windows.short, way.model)


class _Run:
    """One calibration at work."""

    def __init__(
        self,
        job: Job,
        setting: Setting,
        state: CalibrationState,
        threads: int | None,
        tick: Tick | None,
    ) -> None:
        self.job, self.setting, self.state, self.threads = job, setting, state, threads
        self.results: list[BlockResult] = []
        self._streams: list[Streams] = []
        self._tick, self._done, self._rebuilt = tick, 0, 0

    def blocks(self, *, teach: bool, rebuilt: int) -> None:
        """All blocks; those that an earlier run finished are only run through.

        With `teach`, what goes into the dense model's head is kept; with `rebuilt` each block is
        recovered on so many tokens instead.
        """
        from sketchconv.calibration.agreement import check_blocks
        from sketchconv.calibration.teacher import Teacher

        count, teacher = len(self.setting.targets), None
        self._rebuilt = rebuilt
        if teach:
            teacher = Teacher(self.state.folder, self.setting.windows.short)
        if all(self.state.done(index) for index in range(count)) and (not teacher or teacher.done):
            # Nothing depends on the hidden states any more.
            self.results = [self.state.result(index) for index in range(count)]
            return
        wanted = teacher if teacher and not teacher.done else None
        paired, *others = self._open(recover=wanted is not None or bool(rebuilt))
        if not self.state.done(0):
            self._say("comparing the blocks with the whole model", 0)
            check_blocks(paired)
            give_back()
        for index in range(count):
            self._block(index, paired, others)
        if wanted is not None:
            self._keep_final(wanted, others[0])

    def _keep_final(self, teacher: Teacher, streams: Streams) -> None:
        from sketchconv.calibration.heads import final_hidden

        self._say("the dense model's last hidden states", 0)
        for begin, hidden in final_hidden(streams):
            teacher.write(begin, hidden)
        teacher.finish()

    def close(self) -> None:
        """Forget the hidden states."""
        for streams in self._streams:
            streams.close()

    def report(self, seconds: float, peak: int) -> CalibrationReport:
        """What was done."""
        return make_report(self.setting, self.job.plan.steps, self.results, seconds, peak)

    def _open(self, *, recover: bool) -> list[Streams]:
        """Hidden states in front of the first block: those gathered from, then any others."""
        from sketchconv.calibration.streams import Streams

        self._say("embedding the text", 0)
        limit, windows = self.job.max_memory, self.setting.windows
        room = (_HIDDEN_IN_MEMORY if limit is None else limit // 4) // (2 if recover else 1)
        folder = self.state.folder
        self._streams.append(Streams(self.setting, windows.gathered, folder, room))
        if recover:
            both = bool(self._rebuilt)
            others = Streams(
                self.setting, windows.short, folder, room, paired=both, name="recovery-"
            )
            self._streams.append(others)
        return self._streams

    def _block(self, index: int, paired: Streams, others: Sequence[Streams]) -> None:
        from sketchconv.calibration.block import BlockWork

        weights = self.setting.weights
        name = f"{self.setting.path}.{index}"
        digest = weights.fill(name)
        dense = weights.model.get_submodule(name)
        work = BlockWork(index, name, dense, copy.deepcopy(dense), self.setting.targets[index])
        if self.state.done(index):
            self._replay(work, digest)
        else:
            self._calibrate(work, paired, digest, others)
        if len(self.results) <= index:
            self.results.append(self.state.result(index))
        paired.advance(index, name, dense, work.compressed, work.kept)
        for streams in others:
            streams.advance(index, name, dense, work.compressed)
        weights.empty(name)
        give_back()

    def _calibrate(
        self, work: BlockWork, streams: Streams, digest: str, others: Sequence[Streams]
    ) -> None:
        from sketchconv.calibration.block import calibrate_block
        from sketchconv.calibration.state import BlockResult

        where = f"block {work.index + 1}/{len(self.setting.targets)}"
        stages = calibrate_block(
            work, streams, self.setting.weights, self.setting.method, self.threads
        )
        for paths in stages:
            records = [work.targets[path] for path in paths]
            self._say(f"{where}: {paths[-1]}", sum(r.shape[0] * r.shape[1] for r in records))
        rebuilt = self._rebuild(work, others[0]) if self._rebuilt else None
        result = BlockResult(digest, tuple(work.results), work.skipped, rebuilt)
        self.state.save(work.index, work.tensors, result)

    def _rebuild(self, work: BlockWork, streams: Streams) -> dict[str, Any] | None:
        from sketchconv.calibration.rebuild import rebuild
        from sketchconv.recovery.options import RecoveryOptions

        self._say(f"block {work.index + 1}/{len(self.setting.targets)}: recovery", 0)
        seed = 0 if self.job.calibration is None else self.job.calibration.seed
        spill = self.state.folder / "recovery-outputs.hidden" if streams.spilled else None
        options = RecoveryOptions(
            tokens=self._rebuilt,
            seed=seed,
            step_tokens=streams.windows.shape[1],
            max_memory=self.job.max_memory,
        )
        found = rebuild(work, streams, options, spill)
        return None if found is None else asdict(found)

    def _replay(self, work: BlockWork, digest: str) -> None:
        """Put the weights of a finished block in place."""
        from sketchconv.calibration.placing import put_finished
        from sketchconv.errors import CalibrationError

        if self.state.result(work.index).digest != digest:
            raise CalibrationError(
                f"{self.state.folder}: block {work.index} was made from other weights than the "
                "source has now; delete the folder to start anew"
            )
        put_finished(work, self.state, self.setting.weights, self.threads)
        done = sum(r.shape[0] * r.shape[1] for r in work.targets.values())
        self._say(f"block {work.index + 1}/{len(self.setting.targets)}: done before", done)

    def _say(self, text: str, weights: int) -> None:
        self._done += weights
        if self._tick is not None:
            self._tick(text, min(self._done, self.setting.parameters), self.setting.parameters)
