"""Jobs that are killed or starved in a process of their own, and what is there afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rows import toys

NAMES = ("bundle", "folder", "coarse", "apply", "export", "calibrated", "recovered")
# Without a recovery, which takes 2 s; and those that take least.
_FEWER = {"short": NAMES[:-1], "test": ("bundle", "apply", "export")}
VICTIM = Path(__file__).with_name("victim.py")


def names(setting):
    """Which jobs a scorecard has."""
    return setting.jobs or _FEWER.get(setting.size, NAMES)


class Victim:
    """The process that forks for each command; `with` ends it."""

    def __init__(self, threads=4):
        environment = {**os.environ, "NUMBA_NUM_THREADS": str(threads)}
        # Of Numba's layers the one that has no threads before they are needed: see `warm`.
        environment |= {"NUMBA_THREADING_LAYER": "omp", "OMP_NUM_THREADS": "1"}
        environment["TOKENIZERS_PARALLELISM"] = "false"
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(VICTIM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def __call__(self, task, args, **command) -> dict[str, Any]:
        """Carry out one command and return its reply."""
        values = {k: str(a) if isinstance(a, Path) else a for k, a in args.items()}
        line = json.dumps({"task": task, "args": values, **command})
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


@dataclass(frozen=True, slots=True)
class Job:
    """A job whose output is known: its task, its arguments but `out`, the output's name, and bytes.

    `origin` is what its sources held, `calls` how often it changes the disk, `seconds` its time.
    """

    name: str
    task: str
    args: dict[str, Any]
    form: str
    whole: dict[str, bytes]
    origin: dict[Path, dict[str, bytes]]
    calls: int
    seconds: float

    def on(self, folder, **options):
        """The arguments for an output in a folder."""
        return {**self.args, "out": folder / self.form, **options}

    def wrong(self, folder):
        """What is wrong with what lies there now, or None: absent and complete are both fine."""
        out = folder / self.form
        if out.exists() and toys.content(out) != self.whole:
            return "an output that is not the right one"
        for path, data in self.origin.items():
            if toys.content(path) != data:
                return f"the source {path.name} was changed"
        return None

    def unfinished(self, folder, reply):
        """What is wrong after a run that should have ended well, or None."""
        if reply["error"] is not None:
            return f"{reply['error']}: {reply.get('message')}"
        if not (folder / self.form).exists():
            return "no output"
        left = sorted(p.name for p in folder.iterdir() if p.name != self.form)
        return self.wrong(folder) or (f"left behind: {left}" if left else None)


class Shared:
    """A victim and its jobs, 20 s to make, for every row that asks within `with shared`."""

    def __init__(self):
        self._stack, self.made = ExitStack(), {}
        self.victim = self.room = None

    def __enter__(self):
        self.room = Path(self._stack.enter_context(TemporaryDirectory(prefix="faults-jobs-")))
        self.victim = self._stack.enter_context(Victim())
        return self

    def __exit__(self, *_):
        self._stack.close()
        self.made = {}
        self.victim = self.room = None


shared = Shared()


@contextmanager
def jobs(names=NAMES):
    """A victim, and the jobs by name, each carried out once without harm."""
    if shared.victim is None:
        with shared:
            yield from _jobs(names)
    else:
        yield from _jobs(names)


def _jobs(names):
    known = _known(names) if set(names) - shared.made.keys() else {}
    for name in names:
        if name not in shared.made:
            shared.made[name] = _job(shared.victim, shared.room, name, *known[name])
    yield shared.victim, [shared.made[name] for name in names]


def _known(names):
    """What the jobs are: task, arguments, output, sources."""
    room = shared.room / f"sources-{len(shared.made)}"
    room.mkdir()
    llama = toys.llama(room / "tiny-llama")
    base = toys.toys().make_mixed().bundle(room / "base.sktch")
    source = toys.gguf(room / "toy.gguf")
    delta = _delta(room, base)
    known = {
        "bundle": ("convert", {"src": llama}, "m.sktch", [llama]),
        "folder": ("convert", {"src": llama}, "m", [llama]),
        "coarse": ("convert", {"src": llama, "bits": 3}, "m.sktch", [llama]),
        "apply": ("apply", {"src": base, "delta": delta}, "t.sktch", [base, delta]),
        "export": ("export", {"src": source}, "q.gguf", [source]),
    }
    if {"calibrated", "recovered"} & set(names):
        model, text = toys.written(room)
        given = {"src": model, "text": text}
        known["calibrated"] = ("calibrated", given, "m.sktch", [model, text])
        known["recovered"] = ("calibrated", {**given, "recover": 32}, "m.sktch", [model, text])
    return known


def _job(victim, room, name, task, args, form, sources):
    folder = room / f"whole-{name}"
    folder.mkdir()
    replies = []
    for turn in ("first", "second"):
        (folder / turn).mkdir()
        arguments = {**args, "out": folder / turn / form}
        replies.append(victim(task, arguments, warm=turn == "first"))
        if replies[-1]["error"] is not None:
            raise RuntimeError(f"{name}: {replies[-1]}")
    whole = toys.content(folder / "second" / form)
    origin = {path: toys.content(path) for path in sources}
    return Job(name, task, args, form, whole, origin, replies[1]["calls"], replies[1]["seconds"])


def _delta(room, base):
    from sketchconv.deltas.making import create

    toy = toys.toys().make_mixed()
    toy.luts |= toys.toys().tune(toy)
    path = room / "d.sktch"
    create(base, toy.bundle(room / "tuned.sktch"), path)
    return path
