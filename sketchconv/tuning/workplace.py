"""The folder beside the output in which a training keeps its checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sketchconv.deltas.tables import refuse_sources
from sketchconv.errors import OutputError, Suspended, TuningError
from sketchconv.formats import staging
from sketchconv.formats.reader import SktchModel
from sketchconv.tuning.checkpoints import last_checkpoint

_SETTING = "tuning.json"
TRAINER_STATE_NAME = "trainer_state.json"  # as in transformers


def base_digest(path: Path) -> str:
    """One digest over the digests of all tensors of a sketch."""
    with SktchModel.open(path) as sketch:
        text = json.dumps(dict(sketch.manifest.digests), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_output(output: Path, sources: Sequence[Path], *, force: bool) -> None:
    """Refuse early what could not be written.

    Raises:
        OutputError: it exists, its folder does not, or it is one of the sources.
    """
    refuse_sources(output, *sources)
    if output.exists() and not force:
        raise OutputError(f"{output} exists; give --force to replace it")
    if not output.absolute().parent.is_dir():
        raise OutputError(f"{output.absolute().parent}: no such folder; create it first")
    staging.check_target(output.absolute(), folder=output.suffix != ".sktch", overwrite=force)


class Workplace:
    """`OUTPUT.tuning`: checkpoints, and the setting that they belong to.

    Args:
        output: of the tuning.
        setting: all that decides what is trained: sketch, data, options.
        mine: whether this process makes and removes the folder; of several only the first does.
    """

    def __init__(self, output: Path, setting: Mapping[str, Any], *, mine: bool = True) -> None:
        self.mine = mine
        # Absolute: transformers keeps the path of the best checkpoint, for a later resumption too.
        self.folder = output.absolute().with_name(f"{output.name}.tuning")
        self.setting = json.loads(json.dumps(dict(setting)))
        self._output, self._lock, self._written = output, -1, False

    def open(self, *, resume: bool, force: bool) -> Path | None:
        """Make and lock the folder, or find the checkpoint to go on from.

        Raises:
            TuningError: there is nothing to resume, the folder belongs to another tuning, or it
                holds an unfinished one and neither `resume` nor `force` is given.
            OutputError: another process is tuning to this output, or no folder can be made.
        """
        if self.mine and (not resume or self.folder.is_dir()):
            self._lock = staging.lock_folder(self.folder, self._output)
        found = last_checkpoint(self.folder)
        if resume:
            if found is None:
                raise TuningError(f"{self.folder}: no checkpoint to resume from; omit --resume")
            self._compare()
            if self.mine:
                _settle(found)
            return found
        if not self.mine:
            return None
        if found is not None and not force:
            raise TuningError(
                f"{self.folder} holds an unfinished tuning ({found.name}); give --resume to go on "
                "with it, or --force to start anew"
            )
        staging.empty(self.folder)
        (self.folder / _SETTING).write_text(json.dumps(self.setting, indent=2), encoding="utf-8")
        return None

    def finish(self) -> None:
        """The delta is written: remove the folder and all checkpoints."""
        self._written = True
        self._remove()

    def suspended(self) -> KeyboardInterrupt:
        """What to raise after an interrupt; a folder without a checkpoint is removed."""
        if self._written:
            self._remove()
            return Suspended(f"but {self._output} was written, and is whole")
        found = last_checkpoint(self.folder)
        if found is None:
            self._remove()
            return KeyboardInterrupt()
        return Suspended(
            f"no delta was written; {found} is kept: run the same command with --resume to go on"
        )

    def close(self) -> None:
        """Let others have the folder."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _remove(self) -> None:
        if self.mine and self.folder.exists():
            shutil.rmtree(self.folder)

    def _compare(self) -> None:
        try:
            known = json.loads((self.folder / _SETTING).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TuningError(
                f"{self.folder / _SETTING}: cannot be read ({error}); start anew with --force"
            ) from error
        names = sorted({*known, *self.setting})
        odd = [name for name in names if known.get(name) != self.setting.get(name)]
        if odd:
            shown = ", ".join(f"{n} {known.get(n)} -> {self.setting.get(n)}" for n in odd[:3])
            raise TuningError(
                f"{self.folder} is a tuning with another setting ({shown}); give the same options "
                "to resume it, or --force to start anew"
            )


def _settle(checkpoint: Path) -> None:
    """Let a checkpoint name its best sibling where it lies now: the folder may have been moved.

    transformers keeps a whole path, by which it spares the best checkpoint when it drops old ones.

    Raises:
        TuningError: the best checkpoint is not there.
    """
    path = checkpoint / TRAINER_STATE_NAME
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        best = state["best_model_checkpoint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TuningError(f"{path}: cannot be read ({error}); start anew with --force") from error
    if best is None:
        return
    here = checkpoint.parent / Path(best).name
    if not here.is_dir():
        raise TuningError(f"{here}: the best checkpoint is missing; start anew with --force")
    if str(here) != best:
        fresh = path.with_name(path.name + ".new")
        fresh.write_text(json.dumps({**state, "best_model_checkpoint": str(here)}, indent=2))
        fresh.replace(path)
