"""What a model can be shown: as many tokens as it has positions for, of those that it knows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from sketchconv.errors import EvaluationError
from sketchconv.positions import trained_positions

if TYPE_CHECKING:
    from sketchconv.evaluation.network import Network
    from sketchconv.evaluation.ruler import Text
    from sketchconv.evaluation.windows import Cut


def check_windows(network: Network, texts: Iterable[Text]) -> None:
    """Refuse windows that a model cannot be shown; it would end in an index error of torch.

    Raises:
        EvaluationError: too few positions, or a token beyond the embedding.
    """
    for text in texts:
        longest = max((window.ids.shape[0] for window in text.windows), default=0)
        if network.positions is not None and longest > network.positions:
            raise EvaluationError(
                f"{network.name}: windows of {longest} tokens, but the model has positions for "
                f"{network.positions}; take --seq-len {network.positions} or less"
            )
        _check_tokens(network, [window.ids for window in text.windows], text.name)


def check_question(network: Network, ids: Tensor, where: str) -> None:
    """Refuse a question that a model cannot be shown.

    Args:
        network: the model.
        ids: int64 [choices, tokens], padded.
        where: names the question.

    Raises:
        EvaluationError: too few positions, or a token beyond the embedding.
    """
    longest = ids.shape[1]
    if network.positions is not None and longest > network.positions:
        raise EvaluationError(
            f"{where}: {longest} tokens with its longest choice, but {network.name} has positions "
            f"for {network.positions}; shorten the question or leave it out"
        )
    _check_tokens(network, [ids], where)


def check_numbers(name: str, values: Tensor | None) -> None:
    """Refuse NaN, which `argmax` and a table would take for figures.

    Args:
        name: of the model that the values are of.
        values: losses, sums of log-probabilities and the like; None passes.

    Raises:
        EvaluationError: names the model.
    """
    if values is not None and bool(values.isnan().any()):
        raise EvaluationError(
            f"{name}: gives NaN logits, so nothing can be measured on it; try --dtype float32"
        )


def fitted(cut: Cut, paths: Iterable[Path]) -> Cut:
    """A cut with windows no longer than any of several models has positions for."""
    known = [found for path in paths if (found := _stored_positions(path)) is not None]
    return dataclasses.replace(cut, seq_len=min([cut.seq_len, *known]))


def _check_tokens(network: Network, ids: Sequence[Tensor], what: str) -> None:
    largest = max((int(window.max()) for window in ids), default=0)
    if largest >= network.vocabulary:
        raise EvaluationError(
            f"{what}: token {largest}, but {network.name} has an embedding of "
            f"{network.vocabulary} rows; the tokenizer belongs to another model"
        )


def _stored_positions(path: Path) -> int | None:
    """Positions by a model's config alone; what cannot be read is left to the loading to name."""
    from transformers import AutoConfig

    from sketchconv.sources.open import open_source

    try:
        source = open_source(str(path), sketches=True)
        try:
            stored = dict(source.config())
        finally:
            source.close()
        kind = stored.pop("model_type")
        return trained_positions(AutoConfig.for_model(kind, **stored))
    except Exception:  # a config is a checkpoint's own, and fails in many ways
        return None
