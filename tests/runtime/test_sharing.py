"""Modules used by several threads and processes, and tensors changed under them."""

from __future__ import annotations

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn


def test_swapped_tensors_are_seen(layers):
    module, other = layers.linear(bias=False), layers.linear(bias=False)
    other.sketch_lut.data.mul_(-3)
    other.sketch_index.random_(0, 256)
    x = torch.randn(1, 48)
    with torch.no_grad():
        expected = other(x)
        before = module(x)
        module.sketch_lut.data = other.sketch_lut.data.clone()
        module.sketch_index.data = other.sketch_index.clone()
        assert torch.equal(module(x), expected)
        module.load_state_dict(layers.linear(bias=False).state_dict())
        assert torch.equal(module(x), before)
        module.load_state_dict(other.state_dict(), assign=True)
        assert torch.equal(module(x), expected)
        module.sketch_lut.mul_(2)
        assert torch.equal(module(x), 2 * expected)
        module.sketch_lut = nn.Parameter(module.sketch_lut.half())
        assert module.packed().lut.dtype is torch.float16
        module.sketch_index = module.sketch_index.clone()
        assert module.packed().index_pointer == module.sketch_index.data_ptr()


def test_checked_forms_are_made_once_and_dropped_on_moves(layers):
    module = layers.linear()
    first = module.packed()
    module(torch.randn(1, 48))
    assert module.packed() is first
    module.to("meta")
    assert module.packed() is None
    assert module._ready is None  # the memory of the old device is free


def test_strided_tensors_are_read_as_they_are(layers):
    module = layers.linear(bias=False)
    x = torch.randn(2, 48)
    with torch.no_grad():
        expected = module(x)
        lut = module.sketch_lut.detach()
        module.sketch_lut = nn.Parameter(lut.transpose(0, 1).contiguous().transpose(0, 1))
        assert not module.sketch_lut.is_contiguous()
        assert torch.equal(module(x), expected)
        module.sketch_lut.mul_(2)
        assert torch.equal(module(x), 2 * expected)


@pytest.mark.parametrize("train", [False, True])
def test_threads_run_one_module_at_the_same_time(layers, train):
    module = layers.linear(256, 640).requires_grad_(train)
    inputs = [torch.randn(1 + i % 12, 256) for i in range(24)]
    expected = [module(x).detach() for x in inputs]
    start = threading.Barrier(4)

    def work(part):
        start.wait()
        for _ in range(5):
            for i in range(part, len(inputs), 4):
                with torch.set_grad_enabled(train):
                    y = module(inputs[i].clone().requires_grad_(train))
                if train:
                    y.sum().backward(inputs=[p for p in module.parameters() if p is module.bias])
                if not torch.equal(y.detach(), expected[i]):
                    return i
        return None

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [None] * 4


def _in_child(module, x, results):
    torch.set_num_threads(1)  # as the workers of a DataLoader do
    with torch.no_grad():
        results.put([module(x[:1]).tolist(), module(x).tolist()])


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system has no fork"
)
def test_a_fork_runs_what_its_parent_ran(layers):
    module, x = layers.linear(2048, 2100), torch.randn(12, 2048)
    before = torch.get_num_threads()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    try:
        torch.set_num_threads(2)
        with torch.no_grad():
            expected = [module(x[:1]), module(x)]
        child = context.Process(target=_in_child, args=(module, x, results))
        child.start()
        found = results.get(timeout=60)
        child.join(60)
        assert child.exitcode == 0
        with torch.no_grad():
            assert torch.equal(module(x[:1]), expected[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.tensor(found[0]), expected[0])
    assert torch.allclose(torch.tensor(found[1]), expected[1], atol=1e-3)


def _halve(module):
    with torch.no_grad():
        module.sketch_lut.mul_(0.5)


def test_shared_memory_is_one_memory(layers):
    module, x = layers.linear(bias=False), torch.randn(1, 48)
    with torch.no_grad():
        expected = module(x)
        module.share_memory()
        assert module.sketch_index.is_shared()
        assert module.sketch_lut.is_shared()
        assert torch.equal(module(x), expected)
        child = multiprocessing.get_context("fork").Process(target=_halve, args=(module,))
        child.start()
        child.join(60)
        assert torch.equal(module(x), expected / 2)
