"""What the processes of one conversion tell each other. All of it can be pickled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sketchconv.formats.shared import Shared
from sketchconv.journal import Entry
from sketchconv.plan import Plan
from sketchconv.recipe import Recipe

if TYPE_CHECKING:
    from sketchconv.calibration.options import Calibration
    from sketchconv.importers.base import ImportOptions


@dataclass(frozen=True, slots=True)
class Share:
    """To a process: what it takes part in.

    Attributes:
        place: local path of the source.
        imports: see `convert`.
        source: name of the source, for errors.
        infos: digest of the source's names, dtypes and shapes.
        output, recipe, plan, calibration: of the job.
        shared: the output, opened.
        threads: for this process.
        limited: whether memory has a limit.
    """

    place: Path
    imports: ImportOptions | None
    source: str
    infos: str
    output: Path
    recipe: Recipe
    plan: Plan
    calibration: Calibration | None
    shared: Shared
    threads: int
    limited: bool


@dataclass(frozen=True, slots=True)
class Task:
    """To a process: a tensor to convert.

    Attributes:
        name: of the step.
        weights: of its columns, float64 ``[columns]``; None for equal ones.
        entry: what a former run noted of it.
    """

    name: str
    weights: npt.NDArray[np.float64] | None
    entry: Entry | None


@dataclass(frozen=True, slots=True)
class Ready:
    """From a process: it has loaded everything.

    Attributes:
        used: its anonymous memory in bytes.
        compile_seconds: time to compile the solver, or to read it from its cache.
    """

    used: int
    compile_seconds: float


@dataclass(frozen=True, slots=True)
class Advanced:
    """From a process: a chunk of so many values is done."""

    name: str
    action: str
    values: int


@dataclass(frozen=True, slots=True)
class Finished:
    """From a process: a tensor is done, by its own work or a former run's.

    Attributes:
        entry: the tensor.
        peak: highest anonymous memory of the process so far, in bytes.
        solve_seconds: in the solver so far.
    """

    entry: Entry
    peak: int
    solve_seconds: float


@dataclass(frozen=True, slots=True)
class Failed:
    """From a process: it cannot go on.

    Attributes:
        error: what it raised.
        trace: where, in words.
    """

    error: BaseException
    trace: str


Report = Ready | Advanced | Finished | Failed
