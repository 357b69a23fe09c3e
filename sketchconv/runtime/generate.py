"""Write text with a language model, piece by piece."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import torch

from sketchconv.errors import LoadError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Pace:
    """When tokens came, in seconds of `time.perf_counter`; `stream` fills it in.

    Text comes later than tokens: a piece waits until its words are complete.
    """

    tokens: int = 0
    first: float = 0.0
    last: float = 0.0

    def tick(self) -> None:
        """Note one more token."""
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.tokens += 1

    @property
    def per_second(self) -> float:
        """Tokens per second after the first one; 0 where there are fewer than two."""
        return (self.tokens - 1) / (self.last - self.first) if self.tokens > 1 else 0.0


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool | None = None,
    system: str | None = None,
    own_loop: bool = True,
    pace: Pace | None = None,
) -> Iterator[str]:
    """Continue `prompt`, or answer it, and yield the text as it comes.

    Args:
        model: a model that generates.
        tokenizer: its tokenizer.
        prompt: what the user says, or the beginning of a text.
        max_new_tokens: where to stop at the latest.
        temperature: 0 always takes the most likely token.
        top_p: sample among the most likely tokens of this total probability.
        seed: of the sampling; the global random state is left as it was.
        chat: use the chat template; None uses it where there is one.
        system: the system message of the chat.
        own_loop: decode with the compiled loop (`runtime.decoder`) where the model allows it.
        pace: filled in with the times of the tokens, the last one (of the end) included.

    Generation stops at the end-of-sequence tokens of the model's generation config and of the
    tokenizer. Closing the iterator stops it too.

    Raises:
        LoadError: the model does not generate, the prompt is empty, or a chat template is missing.
    """
    if not model.can_generate():
        raise LoadError(f"{type(model).__name__} does not generate text")
    inputs = _encode(model, tokenizer, prompt, chat, system)
    config = _config(model, tokenizer, max_new_tokens, temperature, top_p)
    return _run(model, tokenizer, inputs, config, seed, own_loop, pace or Pace())


def _encode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    chat: bool | None,
    system: str | None,
) -> dict[str, Any]:
    template = getattr(tokenizer, "chat_template", None)
    if chat is None:
        chat = bool(template)
    if chat and not template:
        raise LoadError("this model's tokenizer has no chat template")
    if not chat and system is not None:
        raise LoadError("a system message needs a chat template, and chat not switched off")
    encoded: Any
    if chat:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": prompt})
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    if encoded["input_ids"].numel() == 0:
        raise LoadError("the prompt is empty")
    kept = ("input_ids", "attention_mask")
    return {name: encoded[name].to(model.device) for name in kept if name in encoded}


def _config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> GenerationConfig:
    config: Any = copy.deepcopy(model.generation_config)
    known = config.eos_token_id
    ends = set(known if isinstance(known, list) else [known]) | {tokenizer.eos_token_id}
    config.eos_token_id = sorted(end for end in ends if end is not None) or None
    if config.pad_token_id is None and config.eos_token_id:
        config.pad_token_id = config.eos_token_id[0]
    config.max_new_tokens, config.max_length = max_new_tokens, None
    config.do_sample = temperature > 0
    config.temperature = temperature if temperature > 0 else None
    config.top_p = top_p if temperature > 0 else None
    config.top_k = 0 if temperature > 0 else None
    return config  # type: ignore[no-any-return]


@contextmanager
def _loop(
    model: PreTrainedModel, inputs: dict[str, Any], config: Any, own_loop: bool
) -> Iterator[dict[str, Any]]:
    """The compiled loop while the context lasts, and the cache that `generate` needs for it."""
    from sketchconv.runtime.decoder import Decoder, why_not_generate

    if not own_loop or why_not_generate(model) is not None:
        yield {}
        return
    with Decoder(model) as decoder:
        yield {
            "past_key_values": decoder.cache(inputs["input_ids"].shape[1] + config.max_new_tokens)
        }


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: dict[str, Any],
    config: GenerationConfig,
    seed: int,
    own_loop: bool,
    pace: Pace,
) -> Iterator[str]:
    from transformers import TextIteratorStreamer

    pieces: Any = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    closed = Event()
    failures: list[BaseException] = []
    kind: Any = type(model)
    generate = functools.partial(kind.generate, model)  # transformers' own: `_loop` decides

    def stop(ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        pace.tick()
        return torch.full((ids.shape[0],), closed.is_set(), device=ids.device)

    def work() -> None:
        try:
            with torch.random.fork_rng(devices=[]), _loop(model, inputs, config, own_loop) as cache:
                torch.manual_seed(seed)
                options = {"generation_config": config, "streamer": pieces}
                generate(**inputs, **cache, **options, stopping_criteria=[stop])
        except BaseException as error:  # raised again in the caller's thread
            failures.append(error)
            pieces.on_finalized_text("", stream_end=True)

    thread = Thread(target=work, name="sketchconv-generate", daemon=True)
    thread.start()
    try:
        yield from (piece for piece in pieces if piece)
    finally:
        closed.set()
        thread.join()
    if failures:
        raise failures[0]
