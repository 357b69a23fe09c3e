"""What is kept of the reference when its model is gone: hidden states in files, and its head."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sketchconv.calibration.mapped import map_new
from sketchconv.errors import CalibrationError, EvaluationError
from sketchconv.evaluation.limits import check_windows

if TYPE_CHECKING:
    from sketchconv.evaluation.network import Network
    from sketchconv.evaluation.ruler import Text

# Windows of the first text over which the layers' errors are measured.
LAYER_WINDOWS = 2
Place = tuple[int, int]


class Reference:
    """The hidden states of a reference on every window, and what makes logits of the last ones.

    Only one model is in memory at a time: the reference runs first, and leaves ``tokens x hidden``
    values per window on disk (all layers' for the first windows of the first text). A network whose
    head alone does not give its logits stays in memory, and runs again beside each model.

    Args:
        network: the reference.
        texts: what it is measured on.
        progress: called with the windows done and in all.

    Raises:
        EvaluationError: the disk has no room for the hidden states, or the windows have what the
            model cannot be shown.
    """

    def __init__(
        self,
        network: Network,
        texts: Sequence[Text],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.name, self.vocabulary = network.name, network.vocabulary
        self._network = network
        self._texts = texts
        check_windows(network, texts)
        self._folder = tempfile.TemporaryDirectory(prefix="sketchconv-eval-")
        self._known: dict[Place, tuple[Tensor, ...]] = {}
        places = [(t, w) for t, text in enumerate(texts) for w in range(len(text.windows))]
        for done, place in enumerate(places, 1):
            states = self._run(place)
            if not network.splits:
                return  # logits of a whole vocabulary are too many to keep
            self._known[place] = self._kept(states, place)
            if progress is not None:
                progress(done, len(places))
        network.keep_head()

    def states(self, place: Place) -> tuple[Tensor, ...]:
        """Hidden states of a window: the last ones, and all for windows that the layers need."""
        known = self._known.get(place)
        return self._run(place) if known is None else known

    def logits(self, states: Tensor) -> Tensor:
        """As `Network.logits`."""
        return self._network.logits(states.to(self._network.device))

    def close(self) -> None:
        """Remove the files."""
        self._known.clear()
        self._folder.cleanup()

    def _run(self, place: Place) -> tuple[Tensor, ...]:
        ids = self._texts[place[0]].windows[place[1]].ids
        with torch.inference_mode():
            return self._network.states(ids.unsqueeze(0))

    def _kept(self, states: tuple[Tensor, ...], place: Place) -> tuple[Tensor, ...]:
        wanted = states if place[0] == 0 and place[1] < LAYER_WINDOWS else states[-1:]
        return tuple(self._file(value, (*place, n)) for n, value in enumerate(wanted))

    def _file(self, value: Tensor, name: tuple[int, ...]) -> Tensor:
        path = Path(self._folder.name) / "-".join(map(str, name))
        try:
            kept = map_new(path, tuple(value.shape), value.dtype)
        except CalibrationError as error:
            raise EvaluationError(
                f"{error.__cause__}: no room for the reference's hidden states; free some space in "
                f"{path.parent.parent}, or take fewer windows"
            ) from error
        kept.copy_(value)
        return kept
