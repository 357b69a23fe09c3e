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

from sketchconv.adapters.batch import current
from sketchconv.adapters.manage import adapters_of
from sketchconv.kernels.decoder.session import Session
from sketchconv.kernels.dispatch import choose
from sketchconv.runtime.decoder_cache import DecoderCache
from sketchconv.runtime.decoder_network import Fingerprint, fingerprint, network_of
from sketchconv.runtime.decoder_support import why_not
from sketchconv.runtime.modules import SketchModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Decoder",
    "DecoderCache",
    "default_threads",
    "describe",
    "why_not",
    "why_not_generate",
]

# Weights of a token; below, waking a thread takes longer than it helps.
SHARED_WEIGHTS = 1 << 22

_lock = Lock()
_active: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
_threads_outside: list[int] = []  # torch's number before the blocks that are open; one per block


class Decoder:
    """A model whose single tokens run through the compiled step.

        with Decoder(model) as decoder:
            model.generate(**inputs, past_key_values=decoder.cache())

    Within the block a forward of one token with a cache of `cache()` is one compiled call; every
    other forward is the model's own. Activations are float32 whatever the model's dtype, and so
    are the logits. The model's weights must not change within the block; between blocks they may,
    and a cache from before then goes through the modules. An adapter that is switched within the
    block is followed by the modules, no longer by the step; so are batches of several. Blocks may
    be nested and run in several threads. A copy of the model made within the block would answer for
    the original: copy before. Between steps torch computes on one thread: waking its pool for the
    little that is left to do took 150 ms per token on a busy machine.

    Args:
        model: a model for which `why_not` is None.
        threads: how many threads share a token; None takes `default_threads`. No result depends on
            it.
        kernels: name of the kernels (`dispatch.choose`); None takes the fastest.

    Raises:
        ValueError: `why_not` has a reason, or the shapes do not fit together.
    """

    def __init__(
        self, model: PreTrainedModel, *, threads: int | None = None, kernels: str | None = None
    ) -> None:
        _check(model)
        self.model = model
        self.threads = default_threads(model) if threads is None else threads
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
        return DecoderCache(session, self._fingerprint)

    def __enter__(self) -> Decoder:
        _check(self.model)
        if fingerprint(self.model) != self._fingerprint:
            self._refresh()
        with _lock:
            threads = _torch_threads()
            count = _active.get(self.model, 0)
            if not count:
                self.model.forward = _with_step(self.model, threads, self._fingerprint)
            _active[self.model] = count + 1
            _threads_outside.append(threads)
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
            torch.set_num_threads(_threads_outside.pop())


def _torch_threads() -> int:
    """Torch's number of threads outside of all blocks; within them it is 1 at times."""
    return _threads_outside[0] if _threads_outside else torch.get_num_threads()


def _check(model: PreTrainedModel) -> None:
    reason = why_not(model)
    if reason is not None:
        raise ValueError(f"this model cannot be decoded by the compiled loop: {reason}")


def default_threads(model: PreTrainedModel) -> int:
    """Threads for a token: torch's number, but one where there is too little to share."""
    weights = sum(
        module.rows * module.columns if isinstance(module, SketchModule) else module.weight.numel()
        for module in model.modules()
        if isinstance(module, SketchModule | torch.nn.Linear)
    )
    return _torch_threads() if weights >= SHARED_WEIGHTS else 1


def why_not_generate(model: PreTrainedModel) -> str | None:
    """As `why_not`, and whether `generate` would accept our cache."""
    wanted = getattr(model.generation_config, "cache_implementation", None)
    if wanted is not None:
        return f"the generation config asks for the cache {wanted!r}"
    return why_not(model)


def describe(model: PreTrainedModel) -> str:
    """Which loop `generate.stream` decodes with, and why, in a few words."""
    reason = why_not_generate(model)
    if reason is not None:
        return f"transformers' loop: {reason}"
    threads = default_threads(model)
    return f"own decode loop, {choose().name} kernels, {threads} thread{'s' * (threads > 1)}"


def _with_step(model: Any, threads: int, weights: Fingerprint) -> Callable[..., Any]:
    """The forward of `model` with the compiled step in it; other forwards get torch's `threads`.

    Caches that were made for other weights than `weights` go the normal way.
    """
    from transformers.modeling_outputs import CausalLMOutputWithPast

    original = type(model).forward
    changes = adapters_of(model).changes

    @functools.wraps(original.__get__(model))
    def forward(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        given = {**kwargs, "input_ids": args[0]} if len(args) == 1 else kwargs
        if not (
            len(args) <= 1
            and isinstance(cache, DecoderCache)
            and cache.weights == weights
            and adapters_of(model).changes == changes
            and current() is None
            and _asks_for_logits(model, **given)
            and _follows(cache.length, **given)
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


def _asks_for_logits(
    model: Any,
    *,
    use_cache: bool | None = None,
    return_dict: bool | None = None,
    logits_to_keep: int | Tensor = 0,
    input_ids: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    past_key_values: Any = None,
    **others: Any,
) -> bool:
    """Whether a call asks for logits alone, with nothing that the compiled step does not know."""
    config = model.config
    if torch.is_grad_enabled() or model.training or torch.is_autocast_enabled("cpu"):
        return False
    if use_cache is False or return_dict is False or not isinstance(logits_to_keep, int):
        return False
    if any(value is not None and value is not False for value in others.values()):
        return False
    return config.return_dict and not (config.output_attentions or config.output_hidden_states)


def _follows(
    length: int,
    *,
    input_ids: Tensor | None = None,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    **others: Any,
) -> bool:
    """Whether a call is for one token that comes right after `length` others, all of them seen."""
    if input_ids is None or input_ids.shape != (1, 1):
        return False
    if position_ids is not None and (position_ids.shape != (1, 1) or int(position_ids) != length):
        return False
    if attention_mask is None:
        return True
    return (
        isinstance(attention_mask, Tensor)
        and attention_mask.shape == (1, length + 1)
        and bool(attention_mask.all())
    )
