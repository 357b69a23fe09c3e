"""Decoding with a compiled step of our own, inside transformers' `generate`.

transformers spends 7 to 18 ms per token of a small model on running its modules, as much as the
kernels need. Here one token of the whole network is one compiled call; reading the prompt,
sampling, stopping and streaming stay transformers'.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sketchconv.kernels.decoder.session import Session
from sketchconv.kernels.dispatch import choose
from sketchconv.runtime.decoder_cache import DecoderCache
from sketchconv.runtime.decoder_network import fingerprint, network_of
from sketchconv.runtime.decoder_support import why_not

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Decoder", "DecoderCache", "describe", "why_not"]

_lock = Lock()
_active: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


class Decoder:
    """A model whose single tokens run through the compiled step.

        with Decoder(model) as decoder:
            model.generate(**inputs, past_key_values=decoder.cache())

    Within the block a forward of one token with a cache of `cache()` is one compiled call; every
    other forward is the model's own. Activations are float32 whatever the model's dtype, and so
    are the logits. The model's weights must not change within the block; between blocks they may.
    Blocks may be nested and run in several threads. A copy of the model made within the block
    would answer for the original: copy before. Between steps torch computes on one thread: waking
    its pool for the little that is left to do took 150 ms per token on a busy machine.

    Args:
        model: a model for which `why_not` is None.
        threads: how many threads share a token; None takes torch's number. No result depends on it.
        kernels: name of the kernels (`dispatch.choose`); None takes the fastest.

    Raises:
        ValueError: `why_not` has a reason, or the shapes do not fit together.
    """

    def __init__(
        self, model: PreTrainedModel, *, threads: int | None = None, kernels: str | None = None
    ) -> None:
        reason = why_not(model)
        if reason is not None:
            raise ValueError(f"this model cannot be decoded by the compiled loop: {reason}")
        self.model = model
        self.threads = torch.get_num_threads() if threads is None else threads
        self._kernels = kernels
        self._refresh()

    def _refresh(self) -> None:
        self._fingerprint = fingerprint(self.model)
        self._network = network_of(self.model)

    def cache(self, capacity: int = 256) -> DecoderCache:
        """An empty cache with room for `capacity` positions; it grows where that is not enough.

        Keys and values have the model's dtype, as in transformers' own cache.
        """
        dtype = self.model.dtype
        session = Session(self._network, dtype, capacity, self.threads, self._kernels)
        return DecoderCache(session)

    def __enter__(self) -> Decoder:
        if fingerprint(self.model) != self._fingerprint:
            self._refresh()
        self._torch_threads = torch.get_num_threads()
        with _lock:
            count = _active.get(self.model, 0)
            if not count:
                self.model.forward = _with_step(self.model, self._torch_threads)
            _active[self.model] = count + 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with _lock:
            _active[self.model] -= 1
            if not _active[self.model]:
                del self.model.forward, _active[self.model]
        torch.set_num_threads(self._torch_threads)


def describe(model: PreTrainedModel) -> str:
    """Which loop `generate.stream` decodes with, and why, in a few words."""
    reason = why_not(model)
    if reason is not None:
        return f"transformers' loop: {reason}"
    threads = torch.get_num_threads()
    return f"own decode loop, {choose().name} kernels, {threads} thread{'s' * (threads > 1)}"


def _with_step(model: Any, threads: int) -> Callable[..., Any]:
    """The forward of `model` with the compiled step in it; other forwards get torch's `threads`."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    original = type(model).forward

    @functools.wraps(original.__get__(model))
    def forward(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        given = {**kwargs, "input_ids": args[0]} if len(args) == 1 else kwargs
        if (
            len(args) > 1
            or not isinstance(cache, DecoderCache)
            or not _is_step(model, cache, **given)
        ):
            _set_torch_threads(threads)
            return original(model, *args, **kwargs)
        _set_torch_threads(1)
        logits = cache.session.step(int(given["input_ids"]), cache.length)
        cache.length += 1
        return CausalLMOutputWithPast(logits=logits.view(1, 1, -1), past_key_values=cache)

    forward.is_compiled_step = True  # type: ignore[attr-defined]
    return forward


def _set_torch_threads(threads: int) -> None:
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def _is_step(
    model: Any,
    cache: DecoderCache,
    *,
    input_ids: Tensor | None = None,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    use_cache: bool | None = None,
    logits_to_keep: int | Tensor = 0,
    past_key_values: Any = None,
    **others: Any,
) -> bool:
    """Whether a call is one token that follows what is in the cache, and asks for logits alone."""
    if input_ids is None or input_ids.shape != (1, 1) or use_cache is False:
        return False
    if torch.is_grad_enabled() or model.training or torch.is_autocast_enabled("cpu"):
        return False
    if others.get("return_dict") is False or not isinstance(logits_to_keep, int):
        return False
    if any(value and name != "return_dict" for name, value in others.items()):
        return False
    config = model.config
    if config.output_attentions or config.output_hidden_states or not config.return_dict:
        return False
    if position_ids is not None and (
        position_ids.shape != (1, 1) or int(position_ids) != cache.length
    ):
        return False
    if attention_mask is None:
        return True
    shape = (1, cache.length + 1)
    return (
        isinstance(attention_mask, Tensor)
        and attention_mask.shape == shape
        and bool(attention_mask.all())
    )
