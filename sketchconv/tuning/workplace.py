"""The folder beside the output in which a training keeps its checkpoints."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sketchconv.errors import OutputError, Suspended, TuningError
from sketchconv.formats.reader import SktchModel
from sketchconv.tuning.checkpoints import last_checkpoint

_SETTING = "tuning.json"


def base_digest(path: Path) -> str:
    """One digest over the digests of all tensors of a sketch."""
    with SktchModel.open(path) as sketch:
        text = json.dumps(dict(sketch.manifest.digests), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_output(output: Path, *, force: bool) -> None:
    """Refuse early what could not be written.

    Raises:
        OutputError: it exists, or its folder does not.
    """
    if output.exists() and not force:
        raise OutputError(f"{output} exists; give --force to replace it")
    if not output.absolute().parent.is_dir():
        raise OutputError(f"{output.absolute().parent}: no such folder; create it first")


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

    def open(self, *, resume: bool, force: bool) -> Path | None:
        """Make the folder, or find the checkpoint to go on from.

        Raises:
            TuningError: there is nothing to resume, the folder belongs to another tuning, or it
                holds an unfinished one and neither `resume` nor `force` is given.
        """
        found = last_checkpoint(self.folder)
        if resume:
            if found is None:
                raise TuningError(f"{self.folder}: no checkpoint to resume from; omit --resume")
            self._compare()
            return found
        if not self.mine:
            return None
        if found is not None and not force:
            raise TuningError(
                f"{self.folder} holds an unfinished tuning ({found.name}); give --resume to go on "
                "with it, or --force to start anew"
            )
        self.remove()
        self.folder.mkdir()
        (self.folder / _SETTING).write_text(json.dumps(self.setting, indent=2), encoding="utf-8")
        return None

    def suspended(self) -> KeyboardInterrupt:
        """What to raise after an interrupt; a folder without a checkpoint is removed."""
        found = last_checkpoint(self.folder)
        if found is None:
            self.remove()
            return KeyboardInterrupt()
        return Suspended(
            f"no delta was written; {found} is kept: run the same command with --resume to go on"
        )

    def remove(self) -> None:
        """Remove the folder and all checkpoints."""
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
