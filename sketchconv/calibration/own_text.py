"""Text that a model has written itself, kept beside the output for a run that goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sketchconv.calibration.kept import kept_metadata, save_tensors
from sketchconv.calibration.state import OWN_TEXT, check_folder
from sketchconv.formats.part import os_failures

if TYPE_CHECKING:
    from torch import Tensor

_KEY = "key"
_NAME = "windows"
# (what is at work, tokens done, tokens in all)
Tick = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class OwnText:
    """Where it is kept, and who is told how far it is.

    Attributes:
        folder: of the calibration's state.
        made_from: everything that decides the text but its size and seed, as plain JSON values.
        tick: called while it is written.
    """

    folder: Path
    made_from: Mapping[str, Any]
    tick: Tick | None = None

    def windows(
        self, asked: Mapping[str, int], write: Callable[[Callable[[int, int], None]], Tensor]
    ) -> Tensor:
        """Token ids int64 ``[windows, seq]``: those that an earlier run left, or else new ones.

        Args:
            asked: sizes and seed.
            write: writes the text, and calls its argument with the tokens done and in all.

        Raises:
            CalibrationError: the folder holds something else.
            OutputError: the disk is full or fails.
        """
        key = self._key(asked)
        kept = self._kept(key)
        if kept is not None:
            return kept
        check_folder(self.folder)
        found = write(self._progress)
        with os_failures(self.folder):
            self.folder.mkdir(exist_ok=True)
        save_tensors(self.folder / OWN_TEXT, {_NAME: found}, {_KEY: key})
        return found

    def _key(self, asked: Mapping[str, int]) -> str:
        text = json.dumps([dict(self.made_from), dict(asked)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _kept(self, key: str) -> Tensor | None:
        from safetensors import safe_open

        path = self.folder / OWN_TEXT
        if (kept_metadata(path) or {}).get(_KEY) != key:
            return None
        with safe_open(path, "pt") as file:
            windows: Tensor = file.get_tensor(_NAME)
            return windows

    def _progress(self, done: int, total: int) -> None:
        if self.tick is not None:
            self.tick("writing its own text", done, total)
