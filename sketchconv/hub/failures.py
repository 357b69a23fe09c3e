"""What can go wrong while sending: which failures pass by themselves, and one line for each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from sketchconv.errors import HubError, SketchconvError
from sketchconv.hub.secrets import redact

_T = TypeVar("_T")
TRANSIENT: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
# Seconds between attempts of what huggingface_hub itself does not try again.
_WAITS: Final = (1.0, 2.0, 4.0)
_MAX_WAIT: Final = 60.0
_MAX_REASON: Final = 200
_AGAIN: Final = "run the same command again: what has arrived is not sent again"


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error stands for; None without an answer."""
    code = getattr(getattr(error, "response", None), "status_code", None)
    return code if isinstance(code, int) else None


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: overload, a server's failure, a broken connection."""
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return False
    code = status_of(error)
    if code is not None:
        return code in TRANSIENT
    return isinstance(error, (_transport(), ConnectionError, TimeoutError, json.JSONDecodeError))


def retried(call: Callable[[], _T], recover: Callable[[], _T | None] | None = None) -> _T:
    """Call until it works, at most four times, with growing waits between.

    Args:
        call: raises transient errors as they are.
        recover: asked before each further attempt; what it returns, if not None, is the result.
            For a call whose answer may have been lost although it took effect.
    """
    for wait in (*_WAITS, None):
        try:
            return call()
        except Exception as error:
            if wait is None or not is_transient(error):
                raise
            time.sleep(_wait(error, wait))
        if recover is not None:
            found = recover()
            if found is not None:
                return found
    raise AssertionError("the last attempt returns or raises")


@contextmanager
def explained(repo: str, doing: str, token: str | None) -> Iterator[None]:
    """Turn every error of a push into one line without secrets.

    Args:
        repo: where to.
        doing: what was being done, for instance `"sending model.sktch"`.
        token: the access token in use.

    Raises:
        HubError: in place of the errors of huggingface_hub and of its HTTP library.
    """
    from huggingface_hub import errors

    try:
        yield
    except SketchconvError:
        raise
    except Exception as error:
        cause = error
        while isinstance(cause, RuntimeError) and isinstance(cause.__cause__, Exception):
            cause = cause.__cause__  # huggingface_hub wraps what failed in one of several threads
        known = (errors.HfHubHTTPError, _transport(), OSError, ValueError, RuntimeError, KeyError)
        if not isinstance(cause, known):
            raise
        text = f"{repo}: {doing}: {_explain(cause)}"
        raise HubError(" ".join(redact(text, token).split())) from None


def _explain(error: Exception) -> str:
    from huggingface_hub import errors

    code = status_of(error)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to push"
    if isinstance(error, errors.RevisionNotFoundError):
        return "there is no such revision (404)"
    if code is not None:
        return _of_status(code, error)
    if isinstance(error, json.JSONDecodeError | KeyError):
        return f"the Hub's answer was cut off or is no answer of a Hub; {_AGAIN}"
    if isinstance(error, errors.HFValidationError):
        return f"not a valid name ({_reason(error)})"
    if isinstance(error, (_transport(), ConnectionError, TimeoutError)):
        return f"the connection failed ({_reason(error)}); check the network, then {_AGAIN}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"failed ({_reason(error)}); {_AGAIN}"


def _of_status(code: int, error: Exception) -> str:
    said = getattr(error, "server_message", None)
    said = f": {str(said)[:_MAX_REASON]}" if said else ""
    if code == 401:
        return "not logged in, or the token is not valid (401); run `hf auth login` or set HF_TOKEN"
    if code == 403:
        return f"the token may not do this (403{said}); use one that may write to this repository"
    if code == 404:
        return "not on the Hub (404), or the token may not see it"
    if code in (409, 412):
        return f"someone else changed the repository meanwhile ({code}); {_AGAIN}"
    if code == 413:
        return f"too large for the Hub (413{said}); split it with --max-shard-size"
    if code == 429:
        return f"too many requests (429); wait some minutes, then {_AGAIN}"
    if code >= 500:
        return f"the Hub has failed ({code}); later, {_AGAIN}"
    return f"the Hub refused ({code}{said})"


def _reason(error: Exception) -> str:
    return str(error).split("\n")[0][:_MAX_REASON] or type(error).__name__


def _wait(error: Exception, usual: float) -> float:
    """What the server asks for, within bounds, or the usual."""
    headers: Any = getattr(getattr(error, "response", None), "headers", None) or {}
    asked = str(headers.get("Retry-After") or "")
    return min(float(asked), _MAX_WAIT) if asked.isdigit() else usual


def _transport() -> type[Exception]:
    """The base class of the HTTP library's errors, which has had two names."""
    from huggingface_hub import errors

    found: type[Exception] = getattr(errors, "HTTPError", OSError)
    return found
