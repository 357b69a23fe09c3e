"""One ruler for all models: the same texts, windows and reference for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sketchconv.errors import EvaluationError
from sketchconv.evaluation.layers import LayerErrors
from sketchconv.evaluation.network import Network
from sketchconv.evaluation.scores import TextScore, TokenScores, joined, score
from sketchconv.evaluation.windows import Window

# Windows of the first text over which the layers' errors are measured.
LAYER_WINDOWS = 2
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

    Logits are made in blocks of tokens and never kept. The reference's last hidden states may be
    kept in memory from one model to the next; then the reference runs once in all.

    Args:
        texts: what to measure on.
        reference: the model to compare with, or None.
        remember: keep the reference's hidden states: 2 bytes per token and channel in bf16.
    """

    def __init__(
        self, texts: Sequence[Text], reference: Network | None = None, *, remember: bool = False
    ) -> None:
        self.texts = tuple(texts)
        self.reference = reference
        self._remember = remember
        self._known: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    def measure(self, network: Network, progress: ProgressCallback | None = None) -> Measured:
        """Scores of one model.

        Raises:
            EvaluationError: the model's vocabulary is not the reference's, or it gives NaN.
        """
        self._check_vocabulary(network)
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
        known = self._reference_states(window, place) if self.reference is not None else None
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
        if bool(torch.isnan(scores.loss).any()):
            raise EvaluationError(
                f"{network.name}: gives NaN logits, so it has no perplexity; try --dtype float32"
            )
        return scores

    def _reference_states(self, window: Window, place: tuple[int, int]) -> tuple[Tensor, ...]:
        """Hidden states of the reference; all of them for windows that the layers need."""
        if place in self._known:
            return self._known[place]
        if self.reference is None:
            raise TypeError("there is no reference")
        states = self.reference.states(window.ids.unsqueeze(0))
        if not self._remember or not self.reference.splits:
            return states
        kept = states if place[0] == 0 and place[1] < LAYER_WINDOWS else states[-1:]
        self._known[place] = kept
        return kept

    def _check_vocabulary(self, network: Network) -> None:
        if self.reference is not None and network.vocabulary != self.reference.vocabulary:
            raise EvaluationError(
                f"{network.name}: predicts {network.vocabulary} tokens, the reference "
                f"{self.reference.name} {self.reference.vocabulary}; only models of one "
                "vocabulary can be compared"
            )
