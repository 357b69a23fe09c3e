"""R5: memory does not grow with the model: 1, 4 and 16 times the room that a job is given."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager

import numpy as np
from safetensors.numpy import save_file

from rows import toys
from rows.base import Count, Outcome, Row, Setting
from rows.harness import Victim, jobs

ROOM = 24 << 20  # bytes above what is in use before; the least that a conversion takes is 18 MB


def run(setting: Setting) -> Outcome:
    """Good: the most that was used stays within the room, for every size of the model."""
    count, room = Count(), setting.room("memory")
    # A process of its own, but in the test suite: what others freed there would be used again.
    with jobs(("bundle",)) if setting.size == "test" else _own_victim(room) as (victim, _):
        for times in setting.pick((1, 16), (1, 4, 16), (1, 4, 16)):
            source = _model(room / f"x{times}", times * ROOM)
            arguments = {"src": source, "out": room / "m.sktch", "room": ROOM}
            reply = victim("memory", arguments)
            used = reply.get("value")
            fine = used is not None and used <= ROOM
            count.add(None if fine else f"{times} times: used {used}, {reply}")
            if used is not None:
                count.notes.append(f"model of {times} x {ROOM:,} bytes: {used:,} bytes used")
            shutil.rmtree(source)
            (room / "m.sktch").unlink(missing_ok=True)
    return count.outcome()


@contextmanager
def _own_victim(room):
    with Victim() as victim:
        small = toys.llama(room / "small")
        victim("convert", {"src": small, "out": room / "small.sktch"}, warm=True)
        yield victim, ()


def _model(folder, nbytes):
    """A Llama of one layer whose embedding, which is copied, has most of the bytes, F16.

    One matrix in eight of the size of the embedding is sketched, in row chunks.
    """
    hidden = 1024
    inner = nbytes // 8 // (hidden * 2)
    vocabulary = (nbytes - 3 * inner * hidden * 2) // (hidden * 2)
    config = {**toys.CONFIG, "hidden_size": hidden, "intermediate_size": inner,
              "num_hidden_layers": 1, "vocab_size": vocabulary}  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    # Random enough: values repeat after 2 MiB, and take no time to make.
    some = np.random.default_rng(0).normal(0.01, 0.1, 1 << 20).astype(np.float16)
    arrays = {n: np.resize(some, shape) for n, shape in toys.llama_shapes(config).items()}
    save_file(arrays, folder / "model.safetensors")
    return folder


R5 = Row(
    "R5",
    "models of 1, 4 and 16 times the room above the start (24 MiB) that stay within it",
    "all: flat",
    run,
)
