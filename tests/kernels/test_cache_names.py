"""Compiled code that processes share is never read, nor called, under a wrong name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numba
import numpy as np
import pytest

from sketchconv.kernels import cache_names
from sketchconv.kernels.jit import inner, jit


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


PROGRAM = """
import ctypes, sys
import numba
from numba import types
from sketchconv.kernels.atomics import address_of
from sketchconv.kernels.jit import inner, jit
from sketchconv.kernels.pointers import carray, pointer_to

{plain}
def adder(amount):
    @jit
    def add(to):
        carray(pointer_to(to, types.int64), (1,))[0] += amount
    return add

made = [adder(int(amount)) for amount in sys.argv[1:]]
for function in made:
    function.get_compile_result(types.void(types.int64))
for function in made:
    total = ctypes.c_int64(10)
    call = ctypes.CFUNCTYPE(None, ctypes.c_int64)(address_of(function, 1))
    call(ctypes.addressof(total))
    print(total.value)
"""


@pytest.mark.parametrize("plain", ["", "jit = numba.njit(cache=True)"], ids=["ours", "numba"])
def test_code_from_the_disk_is_not_taken_for_what_was_compiled_here(tmp_path, plain):
    """Each of two processes compiles one function first, and so under the same name in Numba."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(plain=plain))
    told = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}

    def run(*amounts):
        command = [sys.executable, "-P", str(program), *amounts]
        done = subprocess.run(command, env=told, capture_output=True, check=True, text=True)
        return done.stdout.split()

    assert run("4") == ["14"]
    assert run("3", "4") == (["14", "14"] if plain else ["13", "14"])
    assert run("4", "3") == (["13", "13"] if plain else ["14", "13"])


def made(value):
    @jit
    def function():
        return value

    return function.py_func.__qualname__


def test_what_a_kernel_holds_is_in_its_name():
    values = (1, 2, "1", 1.5, True, None, (1, 2), ((1,), 2), np.arange(3), np.arange(3, dtype="i4"))
    names = [made(value) for value in values]
    assert len(set(names)) == len(names)
    assert names == [made(value) for value in values]
    with pytest.raises(TypeError, match="only by plain values"):
        made(object())


def test_functions_inside_kernels_hold_nothing():
    def make(value):
        @inner
        def function():
            return value

    with pytest.raises(TypeError, match="holds values of the function that made it"):
        make(1)


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
