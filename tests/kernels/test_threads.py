"""Spans of rows on threads: all of them, once, whoever calls and whoever helps."""

from __future__ import annotations

import os
import shutil
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from numba import types

from sketchconv.kernels import crew, jit, planes, threads
from sketchconv.kernels.pointers import carray, pointer_to


@pytest.mark.parametrize("rows", [1, 2, 7, 40])
def test_spans_cover_every_row_once(rows, monkeypatch):
    """The smallest sizes are read at each call, so that a test can make small work parallel."""
    monkeypatch.setattr(threads, "SMALLEST_WORK", 1)
    monkeypatch.setattr(threads, "SMALLEST_SPAN", 1)
    spans: list[tuple[int, int]] = []
    threads.for_spans(lambda begin, end: spans.append((begin, end)), rows, 1000, 3)
    assert [row for span in sorted(spans) for row in range(*span)] == list(range(rows))
    assert len(spans) > 1 or rows == 1


@numba.njit(nogil=True)
def _tally(begin, end, counts, b, c, d, e, f):
    """A kernel of `DECODE_ARGS` arguments: counts the runs of each row, checks the rest."""
    rows = carray(pointer_to(counts, np.int64), (end,))
    for row in range(begin, end):
        rows[row] += 1 if (b, c, d, e, f) == (1, 2, 3, 4, 5) else 1000


@numba.njit(nogil=True)
def _tally_more(begin, end, counts, b, c, d, e, f, g, h, i):
    _tally(begin, end, counts, b + i, c, d, e, f + g + h)


KERNELS = {_tally: (1, 2, 3, 4, 5), _tally_more: (-7, 2, 3, 4, -10, 7, 8, 8)}


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.__name__)
def test_the_crew_runs_every_row_once(kernel, count):
    for rows in (1, 2, 7, 40, 1000):
        counts = np.zeros(rows, np.int64)
        for _ in range(50):
            crew.share(kernel, rows, (counts.ctypes.data, *KERNELS[kernel]), count)
        assert (counts == 50).all()


def test_the_crew_wakes_up_after_a_rest():
    counts = np.zeros(64, np.int64)
    for _ in range(5):
        time.sleep(0.05)
        crew.share(_tally, 64, (counts.ctypes.data, *KERNELS[_tally]), 2)
    assert (counts == 5).all()


def test_callers_from_many_threads_get_their_own_rows():
    """One has the crew at a time, the others work alone; none sees the job of another."""

    def caller(size: int) -> bool:
        counts = np.zeros(size, np.int64)
        for _ in range(200):
            crew.share(_tally, size, (counts.ctypes.data, *KERNELS[_tally]), 3)
        return bool((counts == 200).all())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(caller, range(50, 58)))


def test_a_helper_takes_part():
    """With a caller that is slow in its first span, somebody else must take another."""
    seen = np.zeros(64, np.int64)
    for _ in range(200):
        crew.share(_slow, 64, (seen.ctypes.data, 64, 0, 0, 0, 0), 2)
        if len(set(seen.tolist())) > 1:
            return
    pytest.fail("every row of 200 jobs was run by the caller's thread")


_self: Any = types.ExternalFunction("pthread_self", types.int64())


@numba.njit(nogil=True)
def _slow(begin, end, seen, rows, c, d, e, f):
    """Write the thread of each row; long enough for a helper to come."""
    owner = carray(pointer_to(seen, np.int64), (rows,))
    total = 0.0
    for i in range(1_000_000):
        total += np.sqrt(float(i))
    for row in range(begin, end):
        owner[row] = _self() if total > 0 else 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_works_without_the_threads_of_its_parent():
    counts = np.zeros(64, np.int64)
    args = (counts.ctypes.data, *KERNELS[_tally])
    crew.share(_tally, 64, args, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads is the point
        child = os.fork()
    if not child:
        crew.share(_tally, 64, args, 2)
        os._exit(0 if (counts == 2).all() else 1)
    assert os.waitpid(child, 0)[1] == 0
    crew.share(_tally, 64, args, 2)
    assert (counts == 2).all()


def test_an_edit_of_any_module_gives_compiled_code_another_name(tmp_path):
    """Else a constant of a module that compiles nothing itself would live on in the cache."""
    source = Path(jit.__file__).parent
    folder = tmp_path / "kernels"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("__pycache__"))
    before = jit.sources_digest(source)
    assert planes._pack_span.py_func.__qualname__ == f"_pack_span_{before}"
    digests = {before}
    modules = sorted(
        (*folder.glob("*.py"), *folder.glob("decoder/*.py"), *folder.glob("ggml/*.py"))
    )
    for path in modules:
        path.write_text(path.read_text() + "# edited\n")
        jit.sources_digest.cache_clear()
        digests.add(jit.sources_digest(folder))
    assert len(digests) == len(modules) + 1
