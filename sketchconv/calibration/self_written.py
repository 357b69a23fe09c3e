"""Calibration text that the model writes itself, for when there is no data set.

Sampling a model gives text from the distribution that it has learned, which is the domain that a
compressed copy has to keep (LLM-QAT, Liu et al. 2023, used it to train). Each sequence starts with
the tokens that open a document of this model, then one token drawn from the whole vocabulary so
that sequences differ, then text sampled token by token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sketchconv.calibration.windows import SHORT
from sketchconv.errors import LoadError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Tokens sampled at once and tokens of a sequence: short sequences keep the cache, which is copied
# at every token, small; several make one window, and one a window to recover on.
BATCH = 64
SEGMENT = SHORT
TICK = 16  # positions between two reports of progress


def self_written(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    seq_len: int,
    seed: int = 0,
    *,
    temperature: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Sample at least `tokens` tokens from a causal language model, as windows.

    A window is filled with sequences of up to 256 tokens, one after the other. The same model,
    seed and number of torch threads give the same tokens: other thread counts may round a logit
    otherwise, and one token drawn differently changes all that follow it in its sequence.

    Args:
        model: a causal language model of transformers, in memory; its mode is left as it is.
        tokenizer: its tokenizer; gives the tokens that open and end a document.
        tokens: how many to write; rounded up to whole windows.
        seq_len: tokens per window.
        seed: of the sampling; the global random state is left as it was.
        temperature: divides the logits; 1 samples the model's own distribution.
        progress: called with the tokens written and the tokens in all.

    Returns:
        Token ids, int64 [windows, seq_len], on the CPU.

    Raises:
        LoadError: the model does not write text, or gives NaN logits.
        RecipeError: `tokens`, `seq_len` or `temperature` is not positive.
    """
    if tokens < 1 or seq_len < 1 or not temperature > 0:
        raise RecipeError(
            "self-written text: tokens, seq_len and temperature must be positive, "
            f"got {tokens}, {seq_len} and {temperature}"
        )
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise LoadError(
            f"{type(model).__name__} does not write text, so it cannot make its own calibration "
            "text; give a text file instead"
        )
    windows = -(-tokens // seq_len)
    segment = min(SEGMENT, seq_len)
    count = -(-windows * seq_len // segment)
    generator = torch.Generator().manual_seed(seed)
    writer = _Writer(model, tokenizer, generator, temperature)
    parts = []
    with torch.inference_mode():
        for begin in range(0, count, BATCH):
            size = min(BATCH, count - begin)

            def tick(tokens: int, done: int = begin * segment) -> None:
                if progress is not None:
                    progress(done + tokens, count * segment)

            parts.append(writer.write(size, segment, tick))
    return torch.cat(parts).reshape(-1)[: windows * seq_len].reshape(windows, seq_len).clone()


class _Writer:
    """Samples batches of sequences; the state is that of the random generator."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        generator: torch.Generator,
        temperature: float,
    ) -> None:
        self._model = model
        self._generator = generator
        self._temperature = temperature
        self._opening = opening(model, tokenizer)
        self._ends = ends(model, tokenizer)
        self._ordinary = ordinary_tokens(model, tokenizer)

    def write(self, batch: int, length: int, tick: Callable[[int], None]) -> Tensor:
        """Sequences int64 [batch, length]; one that ends early is followed by a new one.

        `tick` is told how many tokens are written, every few positions and at the end.
        """
        cache = None
        written = torch.empty(batch, length, dtype=torch.int64)
        # Position within the current document of each sequence.
        place = torch.zeros(batch, dtype=torch.int64)
        logits: Tensor | None = None
        for n in range(length):
            token = self._next(place, logits)
            written[:, n] = token
            # Where one token opens documents and ends them too, the opening ends none.
            ended = torch.isin(token, self._ends) & (place >= len(self._opening))
            place = torch.where(ended, 0, place + 1)
            if (n + 1) % TICK == 0 or n + 1 == length:
                tick((n + 1) * batch)
            if n + 1 < length:
                new = written[:, : n + 1] if cache is None else token.unsqueeze(1)
                logits, cache = self._logits(new, cache)
        return written

    def _next(self, place: Tensor, logits: Tensor | None) -> Tensor:
        """The next token of each sequence: of the opening, then any at all, then sampled."""
        batch = place.shape[0]
        opening = len(self._opening)
        first = torch.randint(len(self._ordinary), (batch,), generator=self._generator)
        token = self._ordinary[first]
        if logits is not None:
            token = torch.where(place > opening, self._sampled(logits), token)
        if opening:
            token = torch.where(place < opening, self._opening[place.clamp(max=opening - 1)], token)
        return token

    def _logits(self, new: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Logits after `new` [batch, n], float32 [batch, vocabulary] on the CPU, and the cache.

        A model without a cache of keys and values gives None, and is shown the whole text again.
        """
        new = new.to(self._model.device)
        out = self._model(input_ids=new, past_key_values=cache, use_cache=True)
        logits: Tensor = out.logits[:, -1].float().cpu()
        if bool(torch.isnan(logits).any()):
            raise LoadError("the model gives NaN logits for text that it wrote itself")
        return logits, getattr(out, "past_key_values", None)

    def _sampled(self, logits: Tensor) -> Tensor:
        """One draw per row by inverting the cumulative distribution: one uniform number each."""
        mass = torch.softmax(logits / self._temperature, -1).cumsum(-1, dtype=torch.float64)
        uniform = torch.rand(logits.shape[0], 1, generator=self._generator, dtype=torch.float64)
        found = torch.searchsorted(mass, uniform * mass[:, -1:], right=True)
        return found.squeeze(1).clamp(max=logits.shape[1] - 1)


def opening(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The tokens that begin a document of this model, int64 [n]; possibly none."""
    known = tokenizer.bos_token_id
    known = model.config.get_text_config().bos_token_id if known is None else known
    return torch.tensor([] if known is None else [known], dtype=torch.int64)


def ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The tokens that end a document of this model, int64 [n], ascending."""
    config = getattr(model, "generation_config", None)
    known = getattr(config, "eos_token_id", None)
    found = set(known if isinstance(known, list) else [known]) | {tokenizer.eos_token_id}
    return torch.tensor(sorted(end for end in found if end is not None), dtype=torch.int64)


def ordinary_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Every token that the model knows and that is not special, int64 [n], ascending."""
    special = set(tokenizer.all_special_ids)
    rows = int(model.config.get_text_config().vocab_size)
    known = set(tokenizer.get_vocab().values())
    return torch.tensor(
        sorted(i for i in known if i < rows and i not in special), dtype=torch.int64
    )
