"""How long a text a model can be shown, and how long one it is made for."""

from __future__ import annotations

from typing import Any


def model_positions(model: Any) -> int | None:
    """How many positions a model of transformers has; None where it sets no limit.

    Rotary angles are computed for any position: beyond `trained_positions` such a model is worse,
    but runs, and where its angles are scaled the config may name the number before that.
    """
    if any(name.endswith("inv_freq") for name, _ in model.named_buffers()):
        return None
    most = trained_positions(model.config)
    for name, module in model.named_modules():
        rows, padding = (getattr(module, key, None) for key in ("num_embeddings", "padding_idx"))
        if "position" in name and rows is not None and padding is not None:
            most = rows - padding - 1  # RoBERTa's start behind it
    return most


def trained_positions(config: Any) -> int | None:
    """How many positions a config of transformers names; None where it names none."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    # XLNet says -1: no limit.
    return most if isinstance(most, int) and most > 0 else None


def longest_text(model: Any) -> int | None:
    """Tokens of the longest text that a model of transformers is made for; None: no limit."""
    known = (model_positions(model), trained_positions(model.config))
    return min((most for most in known if most is not None), default=None)
