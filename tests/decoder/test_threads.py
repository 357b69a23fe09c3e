"""Threads: the same bits at any number of them, several at once, and after a fork."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest
import torch

from sketchconv.kernels import atomics
from sketchconv.kernels.decoder import session as sessions
from sketchconv.kernels.decoder.crew import Crew
from sketchconv.kernels.decoder.session import Session
from sketchconv.runtime.decoder import Decoder

# Wide enough for several chunks per phase
WIDE = {"hidden_size": 256, "intermediate_size": 640, "num_attention_heads": 8, "vocab_size": 900}
TOKENS = torch.randint(3, 800, (40,), generator=torch.Generator().manual_seed(5)).tolist()


SHAPES = {"v_proj": ("affine", 5, 64), "up_proj": ("iq4_nl", 4, 32), "head": ("affine", 4, 32)}


@pytest.fixture
def network(pair):
    """The network of a model with chunks for several threads."""
    decoder = Decoder(pair(embeddings=True, head=True, **WIDE).model)
    return decoder.cache().session.network


@pytest.fixture
def shaped(pair):
    """The same with shaped sketches among the free ones."""
    decoder = Decoder(pair(head=True, shapes=SHAPES, **WIDE).model)
    return decoder.cache().session.network


def run(network, threads, tokens=TOKENS):
    session = Session(network, threads=threads)
    return torch.stack([session.step(token, i) for i, token in enumerate(tokens)])


def test_the_same_bits_at_any_number_of_threads(network):
    one = run(network, 1)
    for threads in (2, 3, 5):
        assert torch.equal(run(network, threads), one)


def test_shaped_sketches_give_the_same_bits_at_any_number_of_threads(shaped):
    one = run(shaped, 1)
    chunks = [Session(shaped, threads=threads)._program.phases[:, 1] for threads in (1, 3)]
    assert chunks[1].sum() > chunks[0].sum()
    for threads in (2, 3):
        assert torch.equal(run(shaped, threads), one)


def test_phases_are_cut_for_several_threads(network):
    chunks = [Session(network, threads=threads)._program.phases[:, 1] for threads in (1, 2)]
    assert (chunks[0] <= 8).all()
    assert chunks[1].sum() > chunks[0].sum()


def test_helpers_that_come_late_or_never(network, monkeypatch):
    class Lazy(Crew):
        def call(self, jobs):
            late.extend(jobs)

    late = []
    monkeypatch.setattr(sessions, "crew", Lazy)
    session = Session(network, threads=3)
    expected = run(network, 1)
    for i, token in enumerate(TOKENS):
        assert torch.equal(session.step(token, i), expected[i])
        for job in late:  # the token is over: they must find nothing to do
            job()
    assert len(late) == 2 * len(TOKENS)


def test_a_job_from_before_the_memory_grew_finds_no_token(network):
    """Its own memory is too small for the positions that are there now."""
    session = Session(network, capacity=16, threads=2)
    session.step(TOKENS[0], 0)
    late = session._jobs[1]
    session.reserve(4000)
    sessions.open_token(session._cells, TOKENS[1], 1)
    late()
    untouched = not session._cells[sessions.at.COUNTERS :].any()
    sessions.close_token(session._cells, 0)
    assert untouched


def test_helpers_do_their_share(network):
    """A step whose caller only waits is done by the helpers alone."""
    session = Session(network, threads=2)
    expected = session.step(TOKENS[0], 0)
    helper = session._jobs[1]
    session._jobs[0] = lambda: thread.join()
    done = []

    def alone():
        helper()
        done.append(session._program.logits.clone())

    thread = threading.Thread(target=alone)
    session._program.logits.zero_()
    sessions.open_token(session._cells, TOKENS[0], 0)
    thread.start()
    thread.join()
    sessions.close_token(session._cells, 0)
    assert torch.equal(done[0], expected)


def test_several_sequences_at_once(network):
    expected = run(network, 1)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda threads: run(network, threads), (1, 2, 2, 3)):
            assert torch.equal(got, expected)


def test_two_models_generate_at_once(makers, tmp_path):
    models = [makers.build(kind) for kind in ("LlamaForCausalLM", "Qwen3ForCausalLM")]
    prompt = torch.tensor([[3, 4, 5]])
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = [model.generate(prompt, **options) for model in models]

    def work(model):
        with Decoder(model, threads=2) as decoder:
            return model.generate(prompt, past_key_values=decoder.cache(), **options)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, models * 2))
    for got, right in zip(results, expected * 2, strict=True):
        assert torch.equal(got, right)
    assert all("forward" not in vars(model) for model in models)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_after_a_fork(network):
    session = Session(network, threads=2)
    expected = session.step(TOKENS[0], 0)
    session._cells[sessions.at.ACTIVE] = 1  # as if a helper had been inside
    child = os.fork()
    if child == 0:
        right = torch.equal(session.step(TOKENS[0], 0), expected)
        os._exit(0 if right else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_an_interrupt_while_helpers_work(network):
    session = Session(network, threads=2)
    expected = session.step(TOKENS[0], 0)
    normal = session._jobs[0]

    def interrupted():
        raise KeyboardInterrupt

    session._jobs[0] = interrupted
    with pytest.raises(KeyboardInterrupt):
        session.step(TOKENS[0], 0)
    session._jobs[0] = normal
    assert torch.equal(session.step(TOKENS[0], 0), expected)


def test_bad_arguments(network):
    with pytest.raises(ValueError, match="threads"):
        Session(network, threads=0)
    with pytest.raises(ValueError, match="position"):
        Session(network).step(3, -1)


def test_counters_lose_nothing():
    fetch_add, read = atomics.fetch_add, atomics.read

    @numba.njit(nogil=True)
    def count(cell, times):
        for _ in range(times):
            fetch_add(cell.ctypes.data, 3)
        return read(cell.ctypes.data)

    cell = np.zeros(1, np.int64)
    count(cell, 0)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: count(cell, 100_000), range(3)))
    assert cell[0] == 900_000
