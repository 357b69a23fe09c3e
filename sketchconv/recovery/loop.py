"""The loop of training: steps over the training samples, checks on those held out, the best kept.

What a sample is, and what the loss, comes from outside: windows of a whole model (`train`), or
inputs of one of its blocks (`blockwise`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sketchconv.recovery.attention import quicker_attention
from sketchconv.recovery.options import (
    ProgressCallback,
    Recovery,
    RecoveryOptions,
    RecoveryStep,
)
from sketchconv.recovery.products import Products, decoded
from sketchconv.recovery.room import weights_fit
from sketchconv.recovery.tables import Tables
from sketchconv.runtime.modules import SketchLinear

Loss = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]
"""Of the dense model's and the student's outputs ``[tokens, width]``: each token's loss, and (where
asked for) the gradient of their mean with respect to the student's."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be learned.

    Args:
        modules: whose LUTs are trained.
        run: of the numbers of some samples to the student's and the dense model's outputs, both
            ``[samples, length, width]``.
        loss: see `Loss`.
        samples: how many there are; the last are held out.
        length: tokens of a sample.
        measure: name of the loss, for the report.
    """

    modules: Sequence[SketchLinear]
    run: Callable[[Tensor], tuple[Tensor, Tensor]]
    loss: Loss
    samples: int
    length: int
    measure: str


@dataclass(slots=True)
class _Best:
    """The best LUTs so far, rounded, and their held-out loss."""

    values: Tensor
    loss: float


class Loop:
    """One run of training. The model must be frozen and in the dtype to train in."""

    def __init__(
        self, task: Task, options: RecoveryOptions, progress: ProgressCallback | None
    ) -> None:
        self.task, self.options, self.progress = task, options, progress
        kept_out = min(round(task.samples * options.held_out), options.most_held_out // task.length)
        self.training = task.samples - max(kept_out, 1)
        self.per_step = min(max(1, options.step_tokens // task.length), self.training)
        tokens = self.training * task.length if options.tokens is None else options.tokens
        self.steps = max(1, round(tokens / (self.per_step * task.length)))
        self.started = time.perf_counter()

    def run(self, dtype: torch.dtype) -> Recovery:
        """Train with products in `dtype`, and leave the better LUTs in the modules."""
        modules, fit = self.task.modules, self.options.cache_weights
        if fit is None:
            fit = weights_fit(modules, dtype, self.options.max_memory)
        per_step = self.per_step * self.task.length
        tables = Tables(modules, lambda bits: self.options.rate(bits, per_step))
        kept = False
        tables.open()
        try:
            with decoded(modules, dtype if fit else None) as products, quicker_attention():
                result = self._train(tables, products)
            kept = result.kept
        finally:
            tables.close(keep=kept)
        return result

    def _train(self, tables: Tables, products: Products) -> Recovery:
        products.refresh()
        before = self._held_out()
        if not math.isfinite(before):
            return self._result(0, before, None, "the held-out loss was not finite from the start")
        best = _Best(tables.rounded(), before)
        done, note = self._steps(tables, products, best)
        if best.loss >= before:
            return self._result(done, before, None, note or "the held-out loss did not fall")
        tables.values.copy_(best.values)
        return self._result(done, before, best.loss, note)

    def _steps(self, tables: Tables, products: Products, best: _Best) -> tuple[int, str]:
        """All steps: how many were made, and why no more."""
        order = self._order()
        for step in range(1, self.steps + 1):
            value = self._backward(next(order))
            if not math.isfinite(value) or not tables.step(self._share(step), self.options.betas):
                return step - 1, f"stopped at step {step}: a loss or gradient was not finite"
            checked = None
            if self._is_check(step):
                checked = self._check(tables, products, best)
            if step < self.steps:
                products.refresh()
            self._report(step, value, checked)
        return self.steps, ""

    def _check(self, tables: Tables, products: Products, best: _Best) -> float:
        """Measure the rounded LUTs and remember them if they are the best so far."""
        values = tables.rounded()
        with tables.shown(values):
            products.refresh()
            measured = self._held_out()
        if measured < best.loss:
            best.values, best.loss = values, measured
        return measured

    def _backward(self, samples: Tensor) -> float:
        """The mean loss of some samples; its gradients are left in the modules."""
        found, wanted = self._outputs(samples)
        values, grad = self.task.loss(wanted, found.detach(), True)
        if grad is not None:
            torch.autograd.backward(found, grad)
        return float(values.mean())

    def _held_out(self) -> float:
        """Mean loss of the held-out samples."""
        total, tokens = 0.0, 0
        with torch.no_grad():
            for begin in range(self.training, self.task.samples, self.per_step):
                end = min(begin + self.per_step, self.task.samples)
                found, wanted = self._outputs(torch.arange(begin, end))
                values, _ = self.task.loss(wanted, found, False)
                total += float(values.sum())
                tokens += values.numel()
        return total / tokens

    def _outputs(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        found, wanted = self.task.run(samples)
        return found.flatten(0, 1), wanted.flatten(0, 1)

    def _order(self) -> Iterator[Tensor]:
        """Samples of each step: all in a seeded order, then all again in another."""
        generator = torch.Generator().manual_seed(self.options.seed)
        rest = torch.empty(0, dtype=torch.int64)
        while True:
            while rest.numel() < self.per_step:
                rest = torch.cat([rest, torch.randperm(self.training, generator=generator)])
            yield rest[: self.per_step]
            rest = rest[self.per_step :]

    def _share(self, step: int) -> float:
        """Of the learning rate, at step 1, 2, ...: up linearly, then down to 0 behind the last."""
        warm = min(step / (self.options.warmup + 1), 1.0)
        return warm * (self.steps - step + 1) / self.steps

    def _is_check(self, step: int) -> bool:
        every = max(1, self.steps // self.options.checks)
        return step == self.steps or (step > every // 2 and (self.steps - step) % every == 0)

    def _report(self, step: int, loss: float, held_out: float | None) -> None:
        if self.progress is not None:
            seconds = time.perf_counter() - self.started
            self.progress(RecoveryStep(step, self.steps, loss, held_out, seconds))

    def _result(self, steps: int, before: float, after: float | None, note: str) -> Recovery:
        return Recovery(
            steps=steps,
            kl_before=before,
            kl_after=before if after is None else after,
            kept=after is not None,
            seconds=time.perf_counter() - self.started,
            tokens=steps * self.per_step * self.task.length,
            held_out_tokens=(self.task.samples - self.training) * self.task.length,
            measure=self.task.measure,
            note=note,
        )
