"""llama.cpp by the `xllamacpp` wheel: next-token log-probabilities, tokens, text."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import numpy as np


class Runtime:
    """One loaded model; one thread, because two spin on a busy machine."""

    def __init__(self, path: Path, context: int = 256) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx, settings.n_parallel = context, 1
        settings.warmup = False
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        self.server = xllamacpp.Server(settings)

    def log_probabilities(self, tokens: list[int], vocabulary: int) -> np.ndarray:
        """float64 [vocabulary]: of the token that follows, normalised again in float64."""
        answer = self.server.handle_completions(
            {
                "prompt": tokens,
                "n_predict": 1,
                "n_probs": vocabulary,
                "temperature": 0,
                "cache_prompt": False,
            }
        )
        entries = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found = np.full(vocabulary, np.nan)
        for entry in entries:
            found[entry["id"]] = entry["logprob"]
        return found - np.log(np.exp(found).sum())

    def tokens(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text as the runtime cuts it; with `special`, framed as the file says."""
        body = {"content": text, "add_special": special, "parse_special": True}
        request = urllib.request.Request(
            f"{self.server.listening_address}/tokenize",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return list(json.load(answer)["tokens"])


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
