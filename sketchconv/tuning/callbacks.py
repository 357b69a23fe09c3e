"""What happens between the steps of a tuning: reports, and the stop at a broken gradient."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

from sketchconv.tuning.options import ProgressCallback, TuneStep


class Reporter(TrainerCallback):
    """Collects the events of a tuning and passes them on.

    A resumed training has the events of the run before in transformers' own log history.
    """

    def __init__(self, progress: ProgressCallback | None) -> None:
        self.progress = progress
        self.curve: list[TuneStep] = []
        self.started = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """A step's loss, or the loss of the held-out samples."""
        event = _event(state.global_step, state.max_steps, logs or {}, self._seconds())
        if event is None:
            return
        self.curve.append(event)
        if self.progress is not None:
            self.progress(event)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take over the events before a resumption."""
        if state.global_step == 0:
            return
        events = (_event(e["step"], state.max_steps, e, 0.0) for e in state.log_history)
        begun = [event for event in self.curve if event.step == 0]
        self.curve = begun + [event for event in events if event is not None]

    def _seconds(self) -> float:
        return time.perf_counter() - self.started


def _event(step: int, steps: int, logs: dict[str, Any], seconds: float) -> TuneStep | None:
    loss, measured = logs.get("loss"), logs.get("eval_loss")
    if loss is None and measured is None:
        return None
    return TuneStep(step, steps, loss, measured, logs.get("learning_rate"), seconds)


class BrokenStop(TrainerCallback):
    """Stops training once the optimizer has met a gradient that is not finite."""

    def __init__(self) -> None:
        self.at: int | None = None

    def on_step_end(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        """The LUTs are still those of the step before."""
        inner = getattr(optimizer, "optimizer", optimizer)
        if self.at is None and getattr(inner, "broken", False):
            self.at = state.global_step
            control.should_training_stop = True
