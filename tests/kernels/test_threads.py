"""Spans of rows on threads: all of them, once, and none left running behind an exception."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from sketchconv.kernels import crew, gemv_portable, jit, threads


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("culprit", [0, 1])
def test_no_span_outlives_the_call(culprit, error):
    """Whoever fails, the caller or a thread, the others have finished before the caller knows."""
    started, finished = Event(), []

    def kernel(begin: int, end: int) -> None:
        if begin == culprit:
            started.wait()
            raise error
        if begin == 2:
            started.set()
            time.sleep(0.2)
        finished.append(begin)

    with pytest.raises(error):
        crew.share(kernel, 3, 3)
    assert sorted(finished) == [i for i in range(3) if i != culprit]


@pytest.mark.parametrize("rows", [1, 2, 7, 40])
def test_spans_cover_every_row_once(rows, monkeypatch):
    """The smallest sizes are read at each call, so that a test can make small work parallel."""
    monkeypatch.setattr(threads, "SMALLEST_WORK", 1)
    monkeypatch.setattr(threads, "SMALLEST_SPAN", 1)
    for run in (
        lambda kernel: threads.for_spans(kernel, rows, 1000, 3),
        lambda kernel: crew.share(kernel, rows, 3),
    ):
        spans: list[tuple[int, int]] = []
        run(lambda begin, end, found=spans: found.append((begin, end)))
        assert [row for span in sorted(spans) for row in range(*span)] == list(range(rows))
        assert len(spans) > 1 or rows == 1


def test_an_edit_of_any_module_gives_compiled_code_another_name(tmp_path):
    """Else a constant of a module that compiles nothing itself would live on in the cache."""
    source = Path(jit.__file__).parent
    folder = tmp_path / "kernels"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("__pycache__"))
    before = jit.sources_digest(source)
    kernel: Any = gemv_portable.multiply_kernel(4, "F16")
    assert kernel.py_func.__qualname__.endswith(f"multiply_{before}")
    digests = {before}
    modules = sorted(folder.glob("*.py"))
    for path in modules:
        path.write_text(path.read_text() + "# edited\n")
        jit.sources_digest.cache_clear()
        digests.add(jit.sources_digest(folder))
    assert len(digests) == len(modules) + 1
