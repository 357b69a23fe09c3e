"""Compiled code is kept on disk, and found again by the next process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import torch
from sketchconv.kernels import dispatch, gemv
from sketchconv.kernels.packed import Packed
matrix = Packed.of(torch.zeros(2, 1, 1, dtype=torch.uint8), torch.ones(2, 1, 2), 8)
print(gemv.multiply(matrix, torch.ones(1, 8), {name!r}).tolist())
stats = dispatch.choose({name!r}).multiply(1, "F32").stats
print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""


@pytest.mark.parametrize("name", ["best", "portable"])
def test_the_second_process_compiles_nothing(name, tmp_path):
    """The kernels enclose other compiled functions, which Numba's own cache does not recognise."""
    code = CODE.format(name=None if name == "best" else name)
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    for expected in ("0 1", "1 0"):
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            check=True,
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.stdout.split("\n")[:2] == ["[[8.0, 8.0]]", expected]
