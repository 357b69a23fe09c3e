"""Rows on their way into a file: order, bounded memory, errors at their place."""

from __future__ import annotations

import threading
import time
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from sketchconv.export.plan import ExportStep
from sketchconv.export.pool import in_order
from sketchconv.export.rows import BYTES_PER_VALUE, SourceRows, tasks
from sketchconv.export.tasks import write_tasks
from sketchconv.formats.gguf_layout import GgufInfo
from sketchconv.formats.gguf_types import GGML_TYPES
from sketchconv.formats.tensors import TensorInfo
from sketchconv.noted import Noted


class Rows:
    """A source of numbered rows that remembers how many were asked for at once."""

    id, format, nbytes, paths = "rows", "test", 0, (Path("rows"),)

    def __init__(self) -> None:
        self.largest = 0

    def rows(self, step, begin, end):
        self.largest = max(self.largest, end - begin)
        return np.arange(begin, end, dtype=np.float32)[:, None] + np.zeros(
            (1, step.info.shape[-1]), np.float32
        )

    def verbatim(self, step, begin, end):
        raise AssertionError

    def digest(self, step, *others):
        raise AssertionError

    def close(self):
        pass


@dataclass
class Piece:
    name: str
    values: int
    data: bytes


class Last:
    """A writer that remembers the last piece."""

    def append(self, name, data):
        self.data = data


def encoded(reader, steps, budget, threads):
    """The pieces of tensors as they are written; nothing is noted."""
    writer = Last()
    wanted = tasks(reader, steps, budget, threads)
    for name, values in write_tasks(wanted, writer, Noted(None, writer, "m"), threads, budget):
        yield Piece(name, values, writer.data)


def step(name, rows, columns, kind="F32"):
    return ExportStep(GgufInfo(name, (rows, columns), GGML_TYPES[kind]), "test", name)


@pytest.mark.parametrize("threads", [1, 3])
def test_pieces_come_in_order_and_cover_every_row_once(threads):
    steps = [step("a", 1000, 64), step("b", 7, 64), step("c", 129, 64)]
    budget = 100 * 64 * BYTES_PER_VALUE * (threads + 1)
    reader, found = Rows(), {}
    for piece in encoded(reader, steps, budget, threads):
        found.setdefault(piece.name, []).append(piece.data)
        assert piece.values * 4 == len(piece.data)
    assert list(found) == ["a", "b", "c"]
    for item in steps:
        values = np.frombuffer(b"".join(found[item.name]), np.float32).reshape(item.info.shape)
        assert np.array_equal(values[:, 0], np.arange(item.rows))
    assert reader.largest == 64  # whole spans of the 100 rows that fit


def test_working_memory_does_not_grow_with_the_tensor():
    peaks = []
    for rows in (4_000, 64_000):
        tracemalloc.start()
        for piece in encoded(Rows(), [step("a", rows, 256, "Q8_0")], 8 << 20, 2):
            assert piece.data
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] + (1 << 20)
    assert peaks[1] < 16 << 20  # the larger tensor has 62 MiB of float32


def test_a_row_that_does_not_fit_the_budget_still_passes():
    pieces = list(encoded(Rows(), [step("a", 3, 4096)], 1000, 2))
    assert [piece.values for piece in pieces] == [4096] * 3


def test_results_come_in_order_whatever_finishes_first():
    gate = threading.Event()

    def work(item):
        if item == 0:
            assert gate.wait(10)
        else:
            gate.set()
        return item * item

    assert list(in_order(range(5), work, 2)) == [(i, i * i) for i in range(5)]


def test_no_more_is_read_ahead_than_there_are_threads():
    started = []
    results = in_order(iter(range(100)), lambda i: started.append(i) or i, 2)
    next(results)
    assert len(started) <= 4
    results.close()
    assert len(started) <= 4


def test_costs_beyond_the_budget_are_not_in_work_together():
    used, most, lock = 0, 0, threading.Lock()

    def work(cost):
        nonlocal used, most
        with lock:
            used += cost
            most = max(most, used)
        time.sleep(0.001)
        with lock:
            used -= cost
        return cost

    costs = [3, 3, 9, 1, 1, 1, 12, 3, 3]
    done = in_order(costs, work, 4, lambda cost: cost, 9)
    assert [result for _, result in done] == costs
    assert most == 12  # the one that alone passes the budget


def test_an_error_is_raised_at_its_item():
    def work(item):
        if item == 3:
            raise KeyError(item)
        return item

    results = in_order(range(10), work, 2)
    assert [next(results)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError):
        next(results)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kept", [True, False])
def test_a_transposed_tensor_is_read_once_and_encoded_in_pieces(threads, kept):
    values = {name: np.arange(200 * 300, dtype=np.float32).reshape(200, 300) for name in "ab"}

    class Whole:
        id, format, nbytes, paths = "whole", "test", 0, ()
        reads = 0

        def __init__(self):
            self.infos = {name: TensorInfo(name, "F32", (200, 300)) for name in values}

        def rows(self, name, begin, end):
            Whole.reads += 1
            return values[name][begin:end]

        def float32(self, name, raw):
            return raw

    steps = [
        ExportStep(GgufInfo(name, (300, 200), GGML_TYPES["F32"]), "test", name, "transpose")
        for name in values
    ]
    found = {name: [] for name in values}
    budget = 10 * 200 * BYTES_PER_VALUE * (threads + 1)
    reader = SourceRows(Whole())
    reader.keep_bytes = 4 * 200 * 300 if kept else 0
    for piece in encoded(reader, steps, budget, threads):
        found[piece.name].append(piece.data)
    for name, pieces in found.items():
        assert len(pieces) == 30
        assert b"".join(pieces) == values[name].T.tobytes()
    # At the border of two tensors, threads may read one of them again.
    assert Whole.reads <= 2 * threads if kept else Whole.reads == 60
