"""Coverage-guided fuzzing of one reader: `python atheris_target.py KIND [libFuzzer options]`.

Needs `pip install atheris`, which is no dependency of the tests. KIND is one of `mutants.TARGETS`;
the fuzzer's bytes choose the mutations, so that what it learns is which of them go deep.
"""

from __future__ import annotations

import contextlib
import random
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parent))

with atheris.instrument_imports(include=["sketchconv.formats", "sketchconv.sources"]):
    from rows.mutants import TARGETS
    from rows.readers import warm

from sketchconv.errors import SketchconvError


class Bytes(random.Random):
    """Random numbers that are the fuzzer's bytes; zeros when they are used up."""

    def __init__(self, data):
        super().__init__(0)
        self._data = atheris.FuzzedDataProvider(data)

    def random(self):
        return self._data.ConsumeIntInRange(0, 2**32 - 1) / 2**32

    def getrandbits(self, k):
        return self._data.ConsumeIntInRange(0, 2**k - 1)


def main():
    folder = Path(tempfile.mkdtemp(prefix="atheris-"))
    warm(folder / "warm")
    make, read = TARGETS[sys.argv.pop(1)](folder)

    def once(data):
        with contextlib.suppress(SketchconvError):
            read(make(Bytes(data)))

    atheris.Setup(sys.argv, once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
