"""One ruler for all models: the same texts, windows and reference for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sketchconv.errors import EvaluationError
from sketchconv.evaluation.layers import LayerErrors
from sketchconv.evaluation.limits import check_numbers, check_windows
from sketchconv.evaluation.network import Network
from sketchconv.evaluation.reference import LAYER_WINDOWS, Reference
from sketchconv.evaluation.scores import TextScore, TokenScores, joined, score
from sketchconv.evaluation.windows import Window

ProgressCallback = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Text:
    """A text that is cut already."""

    name: str
    windows: tuple[Window, ...]


@dataclass(frozen=True, slots=True)
class Measured:
    """A model's scores on each text; with a reference its layers' errors and its own scores."""

    texts: tuple[TextScore, ...]
    layers: tuple[float, ...] | None
    reference: tuple[TextScore, ...] | None


class Ruler:
    """Measures models on texts, beside a reference.

    Logits are made in blocks of tokens and never kept.

    Args:
        texts: what to measure on.
        reference: what is kept of the model to compare with, on the same texts, or None.
    """

    def __init__(self, texts: Sequence[Text], reference: Reference | None = None) -> None:
        self.texts = tuple(texts)
        self.reference = reference

    def measure(self, network: Network, progress: ProgressCallback | None = None) -> Measured:
        """Scores of one model.

        Raises:
            EvaluationError: the model's vocabulary is not the reference's, it cannot be shown the
                windows, or either of both gives NaN.
        """
        self._check_vocabulary(network)
        check_windows(network, self.texts)
        layers = LayerErrors() if self.reference is not None else None
        total, done = sum(len(text.windows) for text in self.texts), 0
        results, own = [], []
        for t, text in enumerate(self.texts):
            scores = []
            for w, window in enumerate(text.windows):
                chosen = layers if t == 0 and w < LAYER_WINDOWS else None
                with torch.inference_mode():
                    scores.append(self._window(network, window, (t, w), chosen))
                done += 1
                if progress is not None:
                    progress(done, total)
            results.append(TextScore.of(text.name, scores))
            if layers is not None:
                own.append(TextScore.of_reference(text.name, scores))
        if layers is None:
            return Measured(tuple(results), None, None)
        return Measured(tuple(results), layers.values(), tuple(own))

    def _window(
        self, network: Network, window: Window, place: tuple[int, int], layers: LayerErrors | None
    ) -> TokenScores:
        states = network.states(window.ids.unsqueeze(0))
        known = None if self.reference is None else self.reference.states(place)
        if known is not None and layers is not None:
            layers.add(known, states)
        parts = []
        last = window.ids.shape[0] - 1
        for begin in range(window.first, last, network.block()):
            end = min(begin + network.block(), last)
            logits = network.logits(states[-1][0, begin:end])
            theirs = None
            if self.reference is not None and known is not None:
                theirs = self.reference.logits(known[-1][0, begin:end]).to(logits.device)
            targets = window.ids[begin + 1 : end + 1].to(logits.device)
            parts.append(score(logits, targets, theirs))
        scores = joined(parts)
        if self.reference is not None:
            check_numbers(self.reference.name, scores.reference_loss)
        check_numbers(network.name, scores.loss)
        check_numbers(network.name, scores.divergence)
        return scores

    def _check_vocabulary(self, network: Network) -> None:
        if self.reference is not None and network.vocabulary != self.reference.vocabulary:
            raise EvaluationError(
                f"{network.name}: predicts {network.vocabulary} tokens, the reference "
                f"{self.reference.name} {self.reference.vocabulary}; only models of one "
                "vocabulary can be compared"
            )
