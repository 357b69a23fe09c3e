"""A process that talks to the loopback Hub: one JSON request per line, one answer per line.

huggingface_hub reads its settings when it is imported, so it cannot run in the tests' process.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
import traceback
from typing import Any

_sleep = time.sleep
time.sleep = lambda seconds: _sleep(min(seconds, 0.002))  # waits between attempts


def push(models: list[str], repo: str, card: dict[str, Any] | None = None, **options: Any) -> Any:
    from sketchconv.hub import CardOptions
    from sketchconv.hub import push as send

    report = send(models, repo, card=CardOptions(**(card or {})), **options)
    return report.to_json()


def fetch(spec: str, **options: Any) -> Any:
    from sketchconv.hub import fetch as get

    return str(get(spec, **options))


def logits(spec: str, how: str, **options: Any) -> Any:
    """Logits of a fixed input, as text."""
    import torch
    import transformers

    import sketchconv

    if how == "load":
        model = sketchconv.load(spec, **options)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(spec, **options)
    with torch.no_grad():
        out = model(torch.arange(3, 13)[None]).logits
    return out.flatten()[:64].tolist()


def tokens(spec: str, **options: Any) -> Any:
    import sketchconv

    return sketchconv.load_tokenizer(spec, **options)("the quick brown fox")["input_ids"]


def command(*args: str) -> Any:
    """The command line, in this process."""
    from sketchconv.cli.main import run

    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["sketchconv", *args]
    code: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run()
        except SystemExit as end:
            code = end.code
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def setting(token: str | None = None, offline: bool = False) -> None:
    """The token in use, and whether huggingface_hub is offline."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = offline
    os.environ.pop("HF_TOKEN", None)
    if token is not None:
        os.environ["HF_TOKEN"] = token


def main() -> None:
    calls = (push, fetch, logits, tokens, command, setting)
    known = {call.__name__: call for call in calls}
    from sketchconv.errors import SketchconvError

    answers = sys.stdout
    sys.stdout = sys.stderr  # nothing but answers on the real one
    for line in sys.stdin:
        name, args, options = json.loads(line)
        try:
            answer = {"value": known[name](*args, **options)}
        except SketchconvError as error:
            answer = {"kind": type(error).__name__, "error": str(error)}
        except BaseException:
            answer = {"kind": "foreign", "error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


main()
