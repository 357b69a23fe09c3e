"""Measure models: perplexity, divergence from a reference, layers' errors, questions."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sketchconv.errors import EvaluationError
from sketchconv.evaluation.choices import ChoiceScore, Question, answer_questions
from sketchconv.evaluation.limits import fitted
from sketchconv.evaluation.network import Network
from sketchconv.evaluation.opening import common_tokenizer, open_network, resolve
from sketchconv.evaluation.reference import Reference
from sketchconv.evaluation.ruler import Measured, Ruler, Text
from sketchconv.evaluation.scores import TextScore
from sketchconv.evaluation.windows import Cut, cut_windows, opening_tokens
from sketchconv.positions import trained_positions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Called with what is at work, and how much of it is done, of how much.
ProgressCallback = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class ModelScore:
    """One model's figures.

    Args:
        model: as it was named.
        nbytes: size of its weights and side files on disk, where they can be read.
        bits_per_weight: that size over its parameters.
        dtype: of the computation.
        texts: one entry per text.
        layers: relative error of each hidden state against the reference's, the embeddings first.
        choices: None where no question was asked.
        seconds: wall time, loading included.
        context: tokens that its config names as its longest text; None where it names none.
    """

    model: str
    nbytes: int | None
    bits_per_weight: float | None
    dtype: str
    texts: tuple[TextScore, ...]
    layers: tuple[float, ...] | None
    choices: ChoiceScore | None
    seconds: float
    context: int | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All models' figures, and how they were measured.

    Args:
        models: in the order they were named.
        reference: figures of the reference itself; None without one.
        cut: how texts were cut into windows.
        opening: number of tokens (BOS and the like) put before each window.
        device: where it ran.
    """

    models: tuple[ModelScore, ...]
    reference: ModelScore | None
    cut: Cut
    opening: int
    device: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values for ``--json``."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Material:
    """What to measure models on: texts by name, and questions."""

    texts: Mapping[str, str]
    questions: tuple[Question, ...] = ()


def evaluate(
    models: Sequence[str],
    material: Material,
    *,
    reference: str | None = None,
    cut: Cut | None = None,
    fit: bool = False,
    dtype: str | None = None,
    device: str = "auto",
    progress: ProgressCallback | None = None,
) -> Evaluation:
    """Measure models with one ruler, one at a time: the reference first, then the others.

    Args:
        models: folders, sketches, GGUF files or hub ids of causal language models.
        material: texts and questions.
        reference: the model that the others came from; gives divergences and layers' errors.
        cut: how to cut texts; by default 16 windows of 1024 tokens, or fewer as with `fit`.
        fit: cut shorter windows where one of the models has positions for fewer tokens.
        dtype: of the computation; by default each model's own, and for a GGUF file that of the
            reference or float32.
        device: "auto", "cpu", "cuda" or "cuda:n"; "cuda" fails where there is none.
        progress: called after each window.

    Raises:
        EvaluationError: nothing to measure, a model that is none or gives NaN, models that do not
            match, or a text or question that does not fit one of them.
    """
    if not models or not (material.texts or material.questions):
        raise EvaluationError("nothing to measure: name a model, and a text or questions")
    device = _device(device)
    paths = {name: resolve(name) for name in models}
    compared = {} if reference is None else {reference: resolve(reference)}
    tokenizer = common_tokenizer([*compared.items(), *paths.items()])
    fit, cut = fit or cut is None, cut or Cut()
    if fit and material.texts:
        cut = fitted(cut, [*compared.values(), *paths.values()])
    texts = [
        Text(name, tuple(cut_windows(tokenizer, text, cut, name)))
        for name, text in material.texts.items()
    ]
    kept = None
    if reference is not None:
        kept = _measured_first(reference, texts, (dtype, device), tokenizer, material, progress)
    try:
        ruler = Ruler(texts, None if kept is None else kept.states)
        scores, own = [], None
        for name in models:
            opened = _open(name, dtype or _ggufs_dtype(paths[name], kept), device)
            measured = ruler.measure(opened.network, _ticker(progress, name))
            scores.append(_score(opened, measured, tokenizer, material.questions))
            if kept is not None and own is None:
                own = dataclasses.replace(kept.score, texts=measured.reference or ())
            opened.network.keep_head()  # only one model is in memory at a time
    finally:
        if kept is not None:
            kept.states.close()
    return Evaluation(tuple(scores), own, cut, len(opening_tokens(tokenizer)), device)


@dataclass(frozen=True, slots=True)
class _Kept:
    """What is left of the reference when the models come: its states, and its own figures."""

    states: Reference
    score: ModelScore


def _measured_first(
    name: str,
    texts: Sequence[Text],
    how: tuple[str | None, str],
    tokenizer: PreTrainedTokenizerBase,
    material: Material,
    progress: ProgressCallback | None,
) -> _Kept:
    """Run the reference on everything, so that it need not be in memory beside a model."""
    opened = _open(name, *how)
    score = _score(opened, None, tokenizer, material.questions)
    states = Reference(opened.network, texts, _ticker(progress, name))
    seconds = time.perf_counter() - opened.started
    return _Kept(states, dataclasses.replace(score, seconds=seconds))


@dataclass(frozen=True, slots=True)
class _Opened:
    """A loaded model: its name, where it lies, and when its loading began."""

    name: str
    path: Path
    network: Network
    started: float


def _open(name: str, dtype: str | None, device: str) -> _Opened:
    started = time.perf_counter()
    path = resolve(name)
    return _Opened(name, path, open_network(path, dtype=dtype, device=device), started)


def _ggufs_dtype(path: Path, reference: _Kept | None) -> str | None:
    """A GGUF file has no dtype to compute in: then the reference's, so that both round alike."""
    if reference is None or path.suffix != ".gguf":
        return None
    return reference.score.dtype


def _dtype(network: Network) -> str:
    return str(network.model.dtype).removeprefix("torch.")


def _ticker(progress: ProgressCallback | None, name: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(name, done, total)


def _score(
    opened: _Opened,
    measured: Measured | None,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
) -> ModelScore:
    network = opened.network
    choices = answer_questions(network, tokenizer, questions) if questions else None
    nbytes, bits = size_of(opened.path)
    layers = None if measured is None else measured.layers
    texts = () if measured is None else measured.texts
    seconds = time.perf_counter() - opened.started
    return ModelScore(
        *(opened.name, nbytes, bits, _dtype(network), texts, layers, choices, seconds),
        context=trained_positions(network.model.config),
    )


def size_of(path: Path) -> tuple[int | None, float | None]:
    """Bytes on disk and bits per weight of a model; None where its files cannot be read."""
    from sketchconv.errors import SketchconvError
    from sketchconv.summary import summarise

    try:
        summary = summarise(path)
    except (SketchconvError, OSError):
        return None, None
    return summary.nbytes, summary.bits_per_weight


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise EvaluationError(f"--device {name}: torch sees no GPU here; use cpu or auto")
    return name
