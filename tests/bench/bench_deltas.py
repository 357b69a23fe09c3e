"""Size and speed of task deltas on a real sketch, whose every LUT is moved by about 2 %.

Peers run in the same process and take turns with ours: `copy` reads the base, digests it and
writes it again, which any program must do that writes a checked sketch; `safetensors` loads the
base's tensors, puts the tuned LUTs in and saves them, without checking or recording anything, and
for the delta saves the tuned LUTs alone. Every contender forces its file to the disk. After each
coding the reverted file is compared with the base, byte by byte.

    python -P tests/bench/bench_deltas.py [SKETCH] [--rounds 5] [--blocks] [--work FOLDER]

SKETCH is a bundle [default: SmolLM2-135M, Q4_1, 4 bits, embeddings of 8]; --blocks leaves tables
of embeddings as they are.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parent))
from recipes import WORK, sketch, source
from timing import Contender, compete, ratio

from sketchconv.deltas import apply, create, resolve, revert
from sketchconv.deltas.tables import stored_table
from sketchconv.formats.delta_coding import rounded
from sketchconv.formats.reader import SktchModel
from sketchconv.formats.tensors import carried_to_f32

CODINGS: tuple[dict[str, Any], ...] = (
    {"dtype": "same"},
    {"dtype": "same", "mode": "replace"},
    {"dtype": "bf16"},
    {"dtype": "i8"},
    {"dtype": "i8", "span": 4},
)
_CHUNK = 1 << 24


def tuned_tables(base: Path, blocks: bool) -> dict[str, Any]:
    """Every table of a sketch with each entry moved by about 2 % of the mean magnitude."""
    rng, out = np.random.default_rng(1), {}
    with SktchModel.open(base) as model:
        for name, record in model.manifest.sketches.items():
            if blocks and "embed" in name:
                continue
            values = carried_to_f32(stored_table(model, name), record.lut_dtype)
            moved = rng.normal(size=values.shape) * 0.02 * np.abs(values).mean()
            out[name] = rounded((values + moved).astype(np.float32), record.lut_dtype)
    return out


def as_torch(table: Any) -> torch.Tensor:
    """A table for safetensors; BF16 comes as bit patterns."""
    tensor = torch.from_numpy(table)
    return tensor.view(torch.bfloat16) if table.dtype == np.uint16 else tensor


def synced(path: Path) -> None:
    """Force a file to the disk."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def copied(base: Path, out: Path) -> None:
    """Read, digest, write."""
    digest = hashlib.sha256()
    with base.open("rb") as source_, out.open("wb") as target:
        while piece := source_.read(_CHUNK):
            digest.update(piece)
            target.write(piece)
    synced(out)


def replaced(base: Path, tensors: Mapping[str, Any], out: Path) -> None:
    """Load all, put the tuned tables in, save all."""
    whole = {**load_file(base), **tensors}
    save_file(whole, out)
    synced(out)


def measure(base: Path, tuned: Mapping[str, Any], work: Path, rounds: int) -> None:
    """Print sizes, and ratios of medians."""
    stored = {f"{n.removesuffix('.weight')}.sketch_lut": as_torch(t) for n, t in tuned.items()}
    delta, out, back, plain = (work / n for n in ("d.sktch", "t.sktch", "b.sktch", "p.safetensors"))

    def saved() -> None:
        save_file(stored, plain)
        synced(plain)

    peers = {
        "copy": Contender("copy", lambda: copied(base, work / "copy")),
        "replaced": Contender("safetensors", lambda: replaced(base, stored, plain)),
        "saved": Contender("safetensors", saved),
    }
    for coding in CODINGS:
        ours = {
            "create": Contender(
                "create", lambda coding=coding: create(base, tuned, delta, force=True, **coding)
            ),
            "apply": Contender("apply", lambda: apply(base, delta, out, force=True)),
            "revert": Contender("revert", lambda: revert(out, delta, back, base=base, force=True)),
            "resolve": Contender("resolve", lambda: resolve(delta, base)),
        }
        every = [*ours.values(), *peers.values()]
        for contender in peers.values():
            contender.seconds.clear()
        compete(every, rounds)
        told = create(base, tuned, delta, force=True, **coding)
        saved()
        name = f"{told.mode} {told.values}" + (f" span {told.span}" if told.span else "")
        size = ratio(told.nbytes, plain.stat().st_size, "MB", scale=1e-6, digits=2)
        error = "exact" if told.exact else f"largest error {told.largest_error:.1e}"
        print(f"{name}: delta / tuned LUTs: {size}; {error}")
        for verb, peer in (("create", "saved"), ("apply", "copy"), ("apply", "replaced")):
            line = ratio(ours[verb].median, peers[peer].median, "ms", scale=1e3)
            print(f"  {verb} / {peers[peer].name}: {line}")
        line = ratio(ours["revert"].median, peers["copy"].median, "ms", scale=1e3)
        print(f"  revert / copy: {line}")
        print(f"  resolve: {ours['resolve'].median * 1e3:.1f} ms")
        same = back.read_bytes() == base.read_bytes()
        print(f"  reverted file is the base: {'yes' if same else 'NO'}")
        if not same:
            sys.exit(1)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="size and speed of task deltas")
    parser.add_argument("sketch", type=Path, nargs="?", help="a bundle")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--blocks", action="store_true", help="leave embeddings as they are")
    parser.add_argument("--work", type=Path, default=WORK)
    options = parser.parse_args()
    base = options.sketch or sketch(source(None), options.work, 8)
    tuned = tuned_tables(base, options.blocks)
    count = sum(t.size for t in tuned.values())
    print(f"{base.name}: {base.stat().st_size:,} bytes; {len(tuned)} tables, {count:,} entries")
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        measure(base, tuned, Path(work), options.rounds)


if __name__ == "__main__":
    main()
