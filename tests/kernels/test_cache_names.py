"""Two processes that compile at once never read each other's code under a wrong name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numba
import pytest

from sketchconv.kernels import cache_names
from sketchconv.kernels.jit import jit


def adder(amount):
    """A function of its own file names in the cache, one variant for each amount."""

    @numba.njit(cache=True)
    def add(value):
        return value + amount

    return add


@pytest.mark.parametrize("separated", [False, True])
def test_the_race_is_real_in_numba_and_harmless_here(tmp_path, monkeypatch, separated):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    first, second = (adder(amount)._cache._cache_file for amount in (1, 2))
    Path(first._cache_path).mkdir(parents=True, exist_ok=True)
    if separated:
        first._data_name_pattern, second._data_name_pattern = (
            SimpleNamespace(format=lambda number, p=process: f"add.{p}-{number}.nbc")
            for process in ("one", "two")
        )
    read = first._load_index()
    second._load_index = lambda: dict(read)  # both read the index before either wrote there
    save = first._save_data

    def late(*args):
        second.save("key 2", "code 2")
        save(*args)

    first._save_data = late
    first.save("key 1", "code 1")
    del second._load_index
    assert second.load("key 2") == ("code 2" if separated else "code 1")


def test_kernels_have_names_of_their_process():
    @jit
    def double(value):
        return 2 * value

    name = double._cache._cache_file._data_name(3)
    assert name.endswith(f".{cache_names.token()}-3.nbc")
    code = "from sketchconv.kernels.cache_names import token; print(token())"
    other = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=True)
    assert other.stdout.decode().strip() != cache_names.token()
    assert double(4) == 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_fork_has_another_name():
    before = cache_names.token()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.write(writing, cache_names.token().encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    found = os.read(reading, 100).decode()
    os.close(reading)
    assert found
    assert found != before
