"""A process that is killed: `python -P victim.py`, commands as lines of JSON, one reply each.

It imports everything once and forks for each command, so that a kill costs tenths of a second. The
child counts its calls that change the disk; at one of them it kills itself, or they begin to fail.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

CALLS = ("pwrite", "write", "fsync", "replace", "rename", "ftruncate", "posix_fallocate")


def convert(src, out, bits=4, threads=1, max_memory=None):
    from sketchconv.pipeline import convert as run
    from sketchconv.recipe import Recipe, SketchSpec

    recipe = Recipe(SketchSpec(bits=bits), weighting="covariances" if bits == 3 else "moments")
    run(src, out, recipe, threads=threads, max_shard_size=12_000, max_memory=max_memory)


def apply(src, out, delta):
    from sketchconv.deltas.applying import apply as run

    run(src, delta, out)


def export(src, out):
    from sketchconv.export.recipe import ExportRecipe
    from sketchconv.export.run import export_gguf

    export_gguf(src, out, ExportRecipe("Q8_0"), threads=1)


def calibrated(src, out, text, recover=0):
    from sketchconv.calibration.options import Calibration
    from sketchconv.pipeline import convert as run
    from sketchconv.recipe import Recipe, SketchSpec

    asked = Calibration(text, tokens=32, seq_len=16, recover=recover, device="cpu")
    run(src, out, Recipe(SketchSpec(bits=3)), threads=1, calibration=asked)


def memory(src, out, room):
    """Convert with so many bytes above what is in use; prints the most that was used above it."""
    from sketchconv.memory import anonymous_bytes, watched_peak
    from sketchconv.pipeline import convert as run
    from sketchconv.recipe import Recipe, SketchSpec

    recipe = Recipe(SketchSpec(bits=2), weighting="equal")
    before = anonymous_bytes()
    with watched_peak(0.002) as peak:
        run(src, out, recipe, threads=1, max_memory=before + room)
    return peak() - before


TASKS = {"convert": convert, "apply": apply, "export": export, "memory": memory,
         "calibrated": calibrated}  # fmt: skip


class Fault:
    """Counts calls, and does harm at one of them."""

    def __init__(self, at=0, code=0, torn=False):
        self.at, self.code, self.torn, self.calls = at, code, torn, 0

    def install(self):
        for name in CALLS:
            setattr(os, name, self._around(name, getattr(os, name)))

    def _around(self, name, real):
        def call(*args, **kwargs):
            self.calls += 1
            if self.at and self.code and self.calls >= self.at:
                raise OSError(self.code, os.strerror(self.code))
            if self.at and self.calls == self.at:
                if self.torn and name in ("pwrite", "write"):
                    real(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call


def child(command, pipe):
    from sketchconv.errors import SketchconvError

    fault, reply = Fault(**command.get("fault", {})), {"error": None, "ours": True}
    report = os.write
    fault.install()
    try:
        reply["value"] = TASKS[command["task"]](**command["args"])
    except SketchconvError as error:
        reply |= {"error": type(error).__name__, "message": str(error)}
    except BaseException as error:
        reply |= {"error": type(error).__name__, "message": str(error), "ours": False}
    report(pipe, json.dumps({**reply, "calls": fault.calls}).encode())
    os._exit(0)


def serve(command):
    """Run one command in a child; its reply, and the signal that ended it."""
    read, write = os.pipe()
    started, pid = time.monotonic(), os.fork()
    if pid == 0:
        os.close(read)
        child(command, write)
    os.close(write)
    killed = False
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        passed = time.monotonic() - started
        if not killed and passed > command.get("after", 600.0):
            os.kill(pid, signal.SIGKILL)
            killed = True
        time.sleep(0.0005)
    with open(read, "rb") as file:  # noqa: PTH123 - a descriptor
        data = file.read()
    reply = json.loads(data) if data else {"error": "killed", "ours": True}
    return {**reply, "killed": not data, "seconds": time.monotonic() - started}


def warm(command):
    """Run a command in this process: children then have all that it imports and compiles.

    A first conversion imports torch and transformers, 5 s of CPU time; one after it takes 0.2 s.
    """
    TASKS[command["task"]](**command["args"])
    return {"error": None if alone() else "other threads are alive, and cannot be forked"}


def alone():
    """Whether this thread is the only one, once those that were joined have left the kernel too.

    A join returns before that; on a busy machine the end of a pool's thread was seen here.
    """
    for _ in range(100):
        if len(list(Path("/proc/self/task").iterdir())) == 1:
            return True
        time.sleep(0.05)
    return False


def main():
    import tqdm

    import sketchconv.deltas.applying
    import sketchconv.export.run
    import sketchconv.pipeline
    import sketchconv.worker  # noqa: F401

    # transformers' bars would start a thread, and share a lock with all forks: one that is killed
    # while it holds it would stop the next ones for good.
    tqdm.tqdm.monitor_interval = 0
    tqdm.tqdm.set_lock(threading.RLock())

    for line in sys.stdin:
        command = json.loads(line)
        reply = warm(command) if command.get("warm") else serve(command)
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
