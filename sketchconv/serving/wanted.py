"""The bodies of requests, checked: what a completion is asked to be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sketchconv.serving.problems import Problem, bad

MAX_STOPS, MAX_STOP = 4, 200  # strings, and characters of one
MAX_MESSAGES = 1000
SHARED = frozenset(
    {"model", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options", "n"}
)
IGNORED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier"})
# What is there to change nothing; anything else is refused, never silently left out.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1, None),
    "best_of": (1, None),
    "echo": (False, None),
    "suffix": (None, ""),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
}


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen and where they end.

    Attributes:
        max_tokens: at most so many; None where the request leaves it open.
        temperature: 0 takes the most likely token.
        top_p: sample among the most likely tokens of this total probability.
        seed: None for another sample each time.
        stop: text that ends the answer and is not part of it.
    """

    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """One request.

    Attributes:
        model: the base's name or a task's.
        prompt: text, or tokens; None for a chat.
        messages: of a chat: roles and texts.
        sampling: see there.
        stream: whether pieces are sent as they come.
        usage: whether the last piece of a stream counts tokens.
    """

    model: str
    prompt: str | tuple[int, ...] | None
    messages: tuple[dict[str, str], ...]
    sampling: Sampling
    stream: bool
    usage: bool


def completion(body: Any) -> Wanted:
    """The body of `/v1/completions`.

    Raises:
        Problem: 400, naming what is wrong.
    """
    fields = _fields(body, SHARED | {"prompt"})
    return _wanted(fields, _prompt(fields.get("prompt")), (), fields.get("max_tokens", 16))


def chat(body: Any) -> Wanted:
    """The body of `/v1/chat/completions`.

    Raises:
        Problem: 400, naming what is wrong.
    """
    fields = _fields(body, SHARED | {"messages", "max_completion_tokens"})
    limit = _or(fields, "max_completion_tokens", fields.get("max_tokens"))
    return _wanted(fields, None, _messages(fields.get("messages")), limit)


def _fields(body: Any, known: frozenset[str]) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise bad("the body must be a JSON object")
    for name, value in body.items():
        if name in NEUTRAL:
            if not any(value == one and _boolean(value) == _boolean(one) for one in NEUTRAL[name]):
                shown = "only n=1 is supported" if name == "n" else f"{name} is not supported"
                raise bad(f"{shown}, got {str(value)[:60]!r}", name, "unsupported_parameter")
        elif name not in known and name not in IGNORED:
            shown = str(name)[:60]
            raise bad(f"unrecognized argument: {shown}", shown, "unknown_parameter")
    return body


def _boolean(value: Any) -> bool:
    return isinstance(value, bool)


def _wanted(
    fields: Mapping[str, Any],
    prompt: str | tuple[int, ...] | None,
    messages: tuple[dict[str, str], ...],
    limit: Any,
) -> Wanted:
    model = fields.get("model")
    if not isinstance(model, str):
        raise bad("model must name the base or a task", "model")
    options = fields.get("stream_options") or {}
    if not isinstance(options, dict) or not isinstance(options.get("include_usage", False), bool):
        raise bad("stream_options must be an object such as {\"include_usage\": true}",
                  "stream_options")  # fmt: skip
    if limit is not None:
        limit = int(_number(limit, "max_tokens", 1, 2**31, whole=True))
    sampling = Sampling(
        max_tokens=limit,
        temperature=_number(_or(fields, "temperature", 1.0), "temperature", 0, 2),
        top_p=_number(_or(fields, "top_p", 1.0), "top_p", 0, 1),
        seed=_seed(fields.get("seed")),
        stop=_stop(fields.get("stop")),
    )
    if sampling.top_p == 0:
        raise bad("top_p must be above 0", "top_p")
    stream = _or(fields, "stream", False)
    if not isinstance(stream, bool):
        raise bad("stream must be true or false", "stream")
    return Wanted(model, prompt, messages, sampling, stream, options.get("include_usage", False))


def _or(fields: Mapping[str, Any], name: str, default: Any) -> Any:
    value = fields.get(name)
    return default if value is None else value


def _number(value: Any, name: str, low: float, high: float, *, whole: bool = False) -> float:
    right = isinstance(value, int) and not isinstance(value, bool)
    if not (right or (isinstance(value, float) and not whole and math.isfinite(value))):
        raise bad(f"{name} must be {'an integer' if whole else 'a number'}", name)
    number: float = value
    if not low <= number <= high:
        raise bad(f"{name} must be from {low} to {high}, got {number}"[:200], name)
    return number


def _seed(value: Any) -> int | None:
    return None if value is None else int(_number(value, "seed", -(2**63), 2**64 - 1, whole=True))


def _stop(value: Any) -> tuple[str, ...]:
    given = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(given, list) or not all(isinstance(one, str) and one for one in given):
        raise bad("stop must be a string or a list of strings, none empty", "stop")
    if len(given) > MAX_STOPS or any(len(one) > MAX_STOP for one in given):
        raise bad(f"at most {MAX_STOPS} stop strings of {MAX_STOP} characters", "stop")
    return tuple(given)


def _prompt(value: Any) -> str | tuple[int, ...]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(type(one) is int for one in value):
        return tuple(value)
    raise bad("prompt must be one string or one list of tokens", "prompt")


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_MESSAGES:
        raise bad(f"messages must be a list of 1 to {MAX_MESSAGES} messages", "messages")
    return tuple(_message(one, f"messages[{number}]") for number, one in enumerate(value))


def _message(value: Any, where: str) -> dict[str, str]:
    role = value.get("role") if isinstance(value, dict) else None
    if role not in ("system", "developer", "user", "assistant"):
        raise bad(f"{where}.role must be system, developer, user or assistant", where)
    content = value.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    if not isinstance(content, str):
        raise bad(f"{where}.content must be text", where)
    return {"role": "system" if role == "developer" else role, "content": content}


def _part(value: Any, where: str) -> str:
    if isinstance(value, dict) and value.get("type") == "text":
        text = value.get("text")
        if isinstance(text, str):
            return text
    raise Problem(400, f"{where}.content may hold parts of type text alone", param=where)
