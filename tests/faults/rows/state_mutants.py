"""Mutants of what interrupted conversions leave: journals, and states of calibrations."""

from __future__ import annotations

import json

from rows.odd import bytes_changed, mutated, text
from rows.still_valid import framed, unframed
from sketchconv.errors import CalibrationError, ResumeError
from sketchconv.journal import Entry, Journal


def journal(folder):
    """The state of an interrupted conversion: read it, and try to take each tensor from it."""
    out, print_ = folder / "m.sktch", {"a": 1, "b": {"c": [1, 2]}}
    made = Journal(out, print_, resume=False)
    for i in range(4):
        stored = {f"t{i}.sketch_index": "0" * 64, f"t{i}.sketch_lut": "1" * 64}
        made.add(Entry(f"t{i}.weight", "2" * 64, stored, (0.5, 2.0)))
    made.close()
    lines = made.path.read_bytes().splitlines()

    def make(rng):
        now = list(lines)
        for _ in range(rng.choice((1, 1, 2))):
            at = rng.randrange(len(now))
            now[at] = text(mutated(json.loads(lines[at]), rng), rng)
        data = b"\n".join(now) + b"\n"
        made.path.write_bytes(bytes_changed(data, rng) if rng.random() < 0.2 else data)
        return out

    def read(path):
        try:
            found = Journal(path, print_, resume=True).finished
        except ResumeError as error:
            if not str(error).startswith(str(made.path)):
                raise ValueError("the error does not name the state") from error
            raise
        for name, entry in found.items():
            if (
                Entry.from_value(json.loads(entry.to_line())) != entry
                and entry.squares[0] == (entry.squares[0])
            ):
                raise ValueError(f"{name}: not the same when it is written again")

    return make, read


def calibration(folder):
    """The state of a calibration: its fingerprint, a finished block, text that was kept.

    Harmless: a block is what was saved, or is not done; or the state is refused by name.
    """
    import torch

    from sketchconv.calibration.own_text import OwnText
    from sketchconv.calibration.state import BlockResult, CalibrationState, WeightResult

    out, print_, asked = folder / "m.sktch", {"source": ["a", 1], "text": "b"}, {"windows": 2}
    kept = CalibrationState(out, print_)
    block = {"w.sketch_index": torch.arange(24, dtype=torch.uint8).view(2, 3, 4),
             "w.sketch_lut": torch.ones(2, 3, 4, dtype=torch.bfloat16)}  # fmt: skip
    result = BlockResult("0" * 64, (WeightResult("w", 0.5, None, ("x",)),), {"v": "why"})
    kept.save(0, block, result)
    own = OwnText(kept.folder, {"files": "a"})
    tokens = own.windows(asked, lambda _: torch.arange(8).view(2, 4))
    files = {path: path.read_bytes() for path in sorted(kept.folder.iterdir())}

    def make(rng):
        for path, raw in files.items():
            path.write_bytes(raw)
        path = rng.choice(list(files))
        path.write_bytes(_changed(path, files[path], rng))
        return out

    def read(path):
        try:
            state = CalibrationState(path, print_)
        except CalibrationError as error:
            if not str(error).startswith(str(kept.folder)):
                raise ValueError("the error does not name the state") from error
            raise
        if state.done(0):
            found = state.tensors(0, block)
            if state.result(0) != result or not all(map(torch.equal, found, block.values())):
                raise ValueError("a block that is not the one that was kept")
        again = own.windows(asked, lambda _: tokens)
        if not torch.equal(again, tokens):
            raise ValueError("a text that is not the one that was kept")

    return make, read


def _changed(path, raw, rng):
    """One file of the state with a tree of JSON in it changed, some bytes, or its end cut off."""
    if rng.random() < 0.3:
        return bytes_changed(raw, rng)
    if rng.random() < 0.1:
        return raw[: rng.randrange(len(raw))]
    if path.suffix == ".json":
        return text(mutated(json.loads(raw), rng), rng)
    tree, data = unframed(raw)
    return framed(text(mutated(tree, rng), rng), data)
