"""A language model as two parts: a body that gives hidden states, and a head that gives logits."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from sketchconv.errors import EvaluationError
from sketchconv.positions import model_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE_TOKENS = 16
# Other sums of the same numbers, as in a batch of experts, may round otherwise.
_CAUSAL_TOLERANCE = 0.01
# Float32 values of one block of logits: 32 MiB.
_BLOCK_VALUES = 1 << 23


class Network:
    """A causal language model whose logits can be had for a few tokens at a time.

    Where the head alone, applied to the body's output, gives exactly what the whole model gives
    on the first tokens seen, only the body runs on a whole window, and logits are made in blocks
    of tokens. Where it does not (logits that are scaled or capped after the head), the model's own
    logits of one window are kept instead.

    Args:
        model: a causal language model of transformers.
        name: of the model, for errors.

    Raises:
        EvaluationError: the model is no causal language model.
    """

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self.model = cast(Any, model)
        self.name = name
        self.model.eval()
        self._head = self.model.get_output_embeddings()
        if self._head is None or model.config.is_encoder_decoder:
            raise EvaluationError(
                f"{name}: {type(model).__name__} is no causal language model, so it has neither "
                "perplexity nor next-token probabilities"
            )
        self._split: bool | None = None
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        self.positions = model_positions(model)

    @property
    def splits(self) -> bool:
        """Whether the last of `states` holds head inputs; known after the first `states`."""
        return bool(self._split)

    @property
    def device(self) -> torch.device:
        """Where the head is."""
        device: torch.device = next(iter(self._head.state_dict().values())).device
        return device

    def keep_head(self) -> None:
        """Let go of all but the head: from here on only `logits` can be had."""
        self.model = None
        gc.collect()  # modules of transformers refer to each other

    def states(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Hidden states [batch, tokens, hidden]: of the embeddings, then of each layer.

        The last one is what `logits` takes; it is after the final norm. The first call looks at
        how the model computes.

        Args:
            ids: token ids, int64 [batch, tokens].
            mask: int64 [batch, tokens], 0 where a token only pads; None: all count.

        Raises:
            EvaluationError: a later token changes what is predicted before it.
        """
        if self._split is None:
            self._check_causal(ids[:1, :_PROBE_TOKENS])
            self._split = self._head_is_all(ids[:1, :_PROBE_TOKENS])
        options = {"input_ids": ids.to(self.model.device), "output_hidden_states": True}
        if mask is not None:
            options["attention_mask"] = mask.to(self.model.device)
        part: Any = self.model.base_model if self._split else self.model
        out = part(**options, use_cache=False)
        last = out.last_hidden_state if self._split else out.logits
        return (*out.hidden_states[:-1], last)

    def logits(self, states: Tensor) -> Tensor:
        """Float32 logits [n, vocabulary] of rows [n, ...] of the last of `states`."""
        logits: Tensor = self._head(states) if self._split else states
        return logits.float()

    def block(self) -> int:
        """Tokens whose logits are made at once."""
        return max(1, _BLOCK_VALUES // self.vocabulary)

    def _check_causal(self, ids: Tensor) -> None:
        """A model that sees the token it predicts would get a perplexity that means nothing."""
        changed = ids.clone()
        changed[0, -1] = (changed[0, -1] + 1) % self.vocabulary
        first, second = (
            self.model(input_ids=i.to(self.model.device), use_cache=False).logits[0, :-1].float()
            for i in (ids, changed)
        )
        if (first - second).norm() > _CAUSAL_TOLERANCE * first.norm():
            raise EvaluationError(
                f"{self.name}: {type(self.model).__name__} lets later tokens change earlier "
                "predictions, so it is no causal language model and has no perplexity"
            )

    def _head_is_all(self, ids: Tensor) -> bool:
        if self.model.base_model is self.model:
            return False
        ids = ids.to(self.model.device)
        whole = self.model(input_ids=ids, use_cache=False).logits
        body: Any = self.model.base_model
        last = getattr(body(input_ids=ids, use_cache=False), "last_hidden_state", None)
        if last is None or last.shape[-1] != getattr(self._head, "in_features", last.shape[-1]):
            return False
        return torch.equal(whole, self._head(last))
