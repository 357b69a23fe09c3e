"""What is served: a model, its tasks, and how a request becomes a job of the engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sketchconv.adapters.batch import BASE
from sketchconv.errors import AdapterError
from sketchconv.serving.engine import Engine
from sketchconv.serving.jobs import Event, Job
from sketchconv.serving.problems import Problem, bad
from sketchconv.serving.sampling import source
from sketchconv.serving.text import Pieces
from sketchconv.serving.wanted import Wanted


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server takes on.

    Attributes:
        concurrent: answers under way at a time; they are one batch.
        queue: requests that may wait beyond these.
        tokens: tokens of an answer at most.
        prompt: tokens of a prompt at most, fewer where the model has not as many positions.
        body: bytes of a request at most.
    """

    concurrent: int = 8
    queue: int = 64
    tokens: int = 1024
    prompt: int = 8192
    body: int = 1 << 20


class Service:
    """A loaded model, its tokenizer and its adapters under the names of an API.

    Args:
        model: a causal language model with its adapters loaded.
        tokenizer: its tokenizer.
        base: name of the model without an adapter.
        tasks: names of adapters of the model.
        limits: see there.

    Raises:
        AdapterError: a task bears the base's name.
    """

    def __init__(
        self, model: Any, tokenizer: Any, base: str, tasks: Sequence[str], limits: Limits
    ) -> None:
        if base in tasks:
            raise AdapterError(f"a task cannot bear the base's name, {base!r}")
        self.adapters = {base: BASE, **{name: name for name in tasks}}
        self.limits, self.started = limits, int(time.time())
        self._tokenizer = tokenizer
        # A first call may change the tokenizer's settings, which must not happen while it decodes.
        self._encoding = threading.Lock()
        tokenizer("x")
        self._positions = getattr(model.config, "max_position_embeddings", None)
        self._vocabulary = int(model.get_input_embeddings().num_embeddings)
        self.engine = Engine(model, _ends(model, tokenizer), limits.concurrent, limits.queue)

    def job(self, wanted: Wanted, send: Callable[[Event], None]) -> Job:
        """A job for a request, not yet submitted.

        Raises:
            Problem: 404 for an unknown model; 400 for a prompt or an answer that is too long; 429
                and 503 where the engine would refuse it.
        """
        adapter = self.adapters.get(wanted.model)
        if adapter is None:
            there = ", ".join(self.adapters)
            raise Problem(404, f"there is no model {wanted.model[:100]!r}; there are: {there}",
                          param="model", code="model_not_found")  # fmt: skip
        self.engine.check_room()  # tokens and templates take time, which a full queue does not have
        prompt = self._prompt(wanted)
        sampling = replace(wanted.sampling, max_tokens=self._room(len(prompt), wanted))
        # A completion goes on after its prompt, perhaps with a space. A chat's answer begins anew.
        before = () if wanted.prompt is None else prompt
        pieces = Pieces(self._tokenizer, sampling.stop, before)
        return Job(prompt, adapter, sampling, pieces, source(sampling), send)

    def _prompt(self, wanted: Wanted) -> tuple[int, ...]:
        """Tokens of the prompt."""
        if isinstance(wanted.prompt, tuple):
            ids = wanted.prompt
            if any(not 0 <= one < self._vocabulary for one in ids):
                raise bad(f"tokens must be from 0 to {self._vocabulary - 1}", "prompt")
        elif wanted.prompt is not None:
            with self._encoding:
                ids = tuple(self._tokenizer(wanted.prompt)["input_ids"])
        else:
            ids = self._chat(wanted)
        if not ids:
            raise bad("the prompt has no tokens", "prompt")
        return ids

    def _chat(self, wanted: Wanted) -> tuple[int, ...]:
        if not getattr(self._tokenizer, "chat_template", None):
            raise bad("this model has no chat template; use /v1/completions", "messages")
        try:
            with self._encoding:
                found = self._tokenizer.apply_chat_template(
                    list(wanted.messages), add_generation_prompt=True, return_dict=True
                )
        except Exception as error:  # templates refuse what they do not like in many ways
            text = f"the chat template refuses these messages: {error}"[:300]
            raise bad(text, "messages") from error
        return tuple(found["input_ids"])

    def _room(self, prompt: int, wanted: Wanted) -> int:
        """Tokens that the answer may have."""
        asked = wanted.sampling.max_tokens
        if asked is not None and asked > self.limits.tokens:
            most = self.limits.tokens
            raise bad(f"max_tokens is {asked}, this server gives {most} at most", "max_tokens")
        if prompt > self.limits.prompt:
            raise _long(f"the prompt has {prompt} tokens, this server takes {self.limits.prompt}")
        room = self.limits.tokens
        if self._positions is not None:
            room = min(room, self._positions - prompt)
            if room < (asked or 1):
                raise _long(
                    f"the prompt has {prompt} tokens, the answer may have {asked or 1}, and the "
                    f"model has {self._positions} positions"
                )
        return asked or room


def _long(message: str) -> Problem:
    return bad(message, "prompt", "context_length_exceeded")


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """The end-of-sequence tokens of the generation config and of the tokenizer."""
    known = model.generation_config.eos_token_id
    ends = {*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id}
    return frozenset(end for end in ends if end is not None)
