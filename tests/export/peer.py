"""llama.cpp by the `xllamacpp` wheel: next-token log-probabilities, tokens, text.

Each model runs in a process of its own (`peer_process.py`) which is killed, never asked to end: the
destructor of xllamacpp's server waits for ever now and then (2 of 4,000 times on a busy machine,
from whatever test the garbage collector ran in; 0 of 6,000 where nothing was destroyed).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np

SECONDS = 300


class Runtime:
    """One loaded model, with or without a LoRA adapter; one thread: two spin on a busy machine."""

    def __init__(self, path: Path, context: int = 256, adapter: Path | str = "") -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        program = Path(__file__).with_name("peer_process.py")
        self._process = subprocess.Popen(
            [sys.executable, "-P", program, path, str(context), str(adapter)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        weakref.finalize(self, _end, self._process)
        self._answer()

    def _answer(self) -> Any:
        timer = threading.Timer(SECONDS, self._process.kill)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        if not line:
            self._log.seek(0)
            log = self._log.read().decode(errors="replace")[-2000:]
            raise ValueError(f"llama.cpp ended with {self._process.wait()}: {log}")
        return json.loads(line)

    def _ask(self, **request: Any) -> Any:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def log_probabilities(self, tokens: list[int], vocabulary: int) -> np.ndarray:
        """float64 [vocabulary]: of the token that follows, normalised again in float64."""
        answer = self.complete(prompt=tokens, n_predict=1, n_probs=vocabulary)
        entries = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found = np.full(vocabulary, np.nan)
        for entry in entries:
            found[entry["id"]] = entry["logprob"]
        return found - np.log(np.exp(found).sum())

    def complete(self, **request: Any) -> Any:
        """The server's answer to a request for completion: greedy, nothing remembered."""
        return self._ask(completions={"temperature": 0, "cache_prompt": False, **request})

    def tokens(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text as the runtime cuts it; with `special`, framed as the file says."""
        body = {"content": text, "add_special": special, "parse_special": True}
        return list(self._ask(tokenize=body)["tokens"])


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.stdin.close()
    process.stdout.close()
    process.wait()


def reference(model, tokens: list[int]) -> np.ndarray:
    """The same log-probabilities from transformers, in float64."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, -1].double()
    return logits.log_softmax(-1).numpy()


def divergence(expected: np.ndarray, found: np.ndarray) -> float:
    """Kullback-Leibler divergence in nats."""
    return float((np.exp(expected) * (expected - found)).sum())


def prompts(folder: Path, model, lengths: tuple[int, ...]) -> list[list[int]]:
    """Random prompts of these lengths after which the likeliest token can be written as text.

    The runtime gives no probabilities with an end token or with half a UTF-8 character.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rng = np.random.default_rng(7)
    found = []
    for length in lengths:
        while True:
            tokens = [int(t) for t in rng.integers(4, tokenizer.get_vocab_size(), length)]
            best = int(reference(model, tokens).argmax())
            text = tokenizer.decode([best])
            if best > 3 and text.isascii() and not text.startswith("<0x"):
                found.append(tokens)
                break
    return found
