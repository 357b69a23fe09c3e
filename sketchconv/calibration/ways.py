"""How LUTs are recovered: the whole model in the end, each block by itself, or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sketchconv.calibration.needs import by_blocks
from sketchconv.calibration.options import DEFAULT_RECOVERY_TOKENS

if TYPE_CHECKING:
    from sketchconv.calibration.setting import Setting
    from sketchconv.job import Job

_LEAST_WINDOWS = 2


@dataclass(frozen=True, slots=True)
class Way:
    """What was decided.

    Attributes:
        blocks: tokens that each block is recovered on by itself.
        model: tokens that the whole model is recovered on.
        note: why neither, where one was asked for.
    """

    blocks: int = 0
    model: int = 0
    note: str = ""


def choose_way(job: Job, setting: Setting, tokens: int) -> Way:
    """Decide how to recover on so many tokens, before anything is calibrated."""
    if not tokens:
        return Way(note=_nothing_to_do(job))
    windows, length = setting.windows.short.shape
    if windows < _LEAST_WINDOWS:
        least = length * 7 // 8 + 1  # an eighth is held out
        what = "a longer text" if tokens >= least else f"--recover {least} or more"
        return Way(
            note=f"it needs {_LEAST_WINDOWS} windows of {length} tokens, to train on and to "
            f"measure, and has {windows}; take {what}"
        )
    return Way(blocks=tokens) if by_blocks(job, setting) else Way(model=tokens)


def _nothing_to_do(job: Job) -> str:
    """What to say where nothing is recovered: nothing, unless a way was chosen for it."""
    options = job.calibration
    if options is None or options.recover_by == "auto":
        return ""
    why = "--recover is 0"
    if options.recover is None:
        why = "without --recover only sketches of 3 bits and fewer are recovered"
    return (
        f"--recover-by {options.recover_by} was given, but {why}; pass --recover "
        f"{DEFAULT_RECOVERY_TOKENS}"
    )
