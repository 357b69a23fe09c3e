"""Coverage-guided fuzzing of readers: `python atheris_target.py [KIND ...] [libFuzzer options]`.

Needs `pip install atheris`, which is no dependency of the tests. A KIND is one of
`mutants.TARGETS`, by default each in turn; the fuzzer's bytes choose the mutations, so that what it
learns is which of them go deep. `-max_total_time=60` ends each after a minute. Exit code 1 if one
found an error that is not ours, or a wrong reading.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parent))

_OURS = ("formats", "sources", "calibration", "journal", "recipe_file")
with atheris.instrument_imports(include=[f"sketchconv.{name}" for name in _OURS]):
    for name in ("own_text", "state"):  # which their targets import later
        importlib.import_module(f"sketchconv.calibration.{name}")
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


def fuzz(kind, folder, options):
    """One reader, in a process of its own: libFuzzer ends the process. Returns its exit status."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    folder.mkdir()
    make, read = TARGETS[kind](folder)

    def once(data):
        with contextlib.suppress(SketchconvError):
            read(make(Bytes(data)))

    # Long inputs at once: the first bytes alone choose little.
    atheris.Setup([kind, "-len_control=0", "-max_len=4096", *options], once)
    atheris.Fuzz()
    os._exit(0)


def main():
    kinds = [word for word in sys.argv[1:] if not word.startswith("-")] or list(TARGETS)
    options = [word for word in sys.argv[1:] if word.startswith("-")]
    failed = []
    # Not `TemporaryDirectory`: it would be removed at the end of each fork.
    folder = Path(tempfile.mkdtemp(prefix="atheris-"))
    warm(folder / "warm")
    for kind in kinds:
        sys.stderr.write(f"== {kind}\n")
        if fuzz(kind, folder / kind, options):
            failed.append(kind)
    shutil.rmtree(folder)
    sys.stderr.write(f"{len(kinds) - len(failed)} of {len(kinds)} good; not: {failed}\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
