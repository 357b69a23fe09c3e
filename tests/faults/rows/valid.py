"""S2, S4, R6, R12: random good files are taken, as safetensors and the second decoder take them;
and no byte of one can change unseen."""

from __future__ import annotations

import struct

import numpy as np
import safetensors
from safetensors.numpy import save_file

from rows import toys
from rows.base import Count, Outcome, Row, Setting
from rows.mutants import safetensors as safetensors_target
from rows.readers import alarm
from sketchconv.errors import FormatError, SketchconvError
from sketchconv.formats.container import Container
from sketchconv.formats.delta_validate import validate_delta
from sketchconv.formats.reader import SktchModel
from sketchconv.formats.validate import validate
from sketchconv.sources.checkpoint import CheckpointSource
from sketchconv.sources.gguf_blocks import GgufBlocks
from sketchconv.verify import verify


def random_toy(rng):
    """A toy of random shape and widths."""
    size, groups = rng.randrange(1, 9), rng.randrange(1, 5)
    bits = sorted(rng.sample(range(1, 9), rng.randrange(1, 4)))
    lut = rng.choice(("F16", "BF16", "F32"))
    return toys.toys().make_toy(lut, rows=rng.randrange(1, 6), columns=size * groups,
                                groups=groups, bits=bits)  # fmt: skip


def _sketch(folder, rng):
    toy = random_toy(rng)
    path = toy.bundle(folder / "a.sktch") if rng.random() < 0.5 else toy.folder(folder / "a", 300)
    found = list(validate(path))
    if found:
        return str(found[0])
    with SktchModel.open(path) as model:
        same = all(model.read(name) == data for name, data in toy.tensors().items())
    return None if same else "other bytes"


def _delta(folder, rng):
    shape = (rng.randrange(1, 7), rng.randrange(1, 5), 2 ** rng.randrange(1, 9))
    path = folder / rng.choice(("d.sktch", "d"))
    coding, seed = rng.choice(toys.CODINGS), rng.randrange(2**32)
    found = list(validate_delta(toys.delta(path, coding, seed, shape)))
    return str(found[0]) if found else None


def _gguf(folder, rng):
    path = toys.gguf(folder / "a.gguf", rng.randrange(1, 9), rng.randrange(2**32))
    blocks = GgufBlocks(path)
    try:
        for name, info in blocks.tensors.items():
            blocks.rows(name, 0, int(np.prod(info.shape[:-1], dtype=int)))
    finally:
        blocks.close()


def _foreign(folder, rng):
    kinds = (np.float32, np.float16, np.int8, np.uint8, np.int64, np.bool_, np.float64)
    arrays = {}
    for i in range(rng.randrange(1, 6)):
        shape = tuple(rng.randrange(0, 5) for _ in range(rng.randrange(0, 5)))
        arrays[rng.choice(("a", "é", "x/y", "b c", '"', "")) + str(i)] = np.zeros(
            shape, rng.choice(kinds)
        )
    meta = rng.choice((None, {"format": "pt"}, {"k": "vé\n"}))
    save_file(arrays, folder / "a.safetensors", meta)
    return _differs(folder / "a.safetensors", must=True)


def _differs(path, must=False):
    """What differs between our reading of a file and that of safetensors, or None."""
    raw = path.read_bytes()
    try:
        with Container.open(path, profile="safetensors") as c:
            ours = {n: (e.info.dtype, e.info.shape, c.read(n)) for n, e in c.entries.items()}
    except FormatError as error:
        return f"refused: {error}" if must else "-"
    try:
        theirs = {
            n: (t["dtype"], tuple(t["shape"]), bytes(t["data"]))
            for n, t in safetensors.deserialize(raw)
        }
    except Exception as error:
        return f"accepted by us, not by safetensors: {error}"
    return None if ours == theirs else "read differently"


def _snapshot(folder, rng):
    """A download of the Hub: links into `blobs/`, directly or by a second link."""
    model = folder / "models--a--b"
    model, blobs = toys.llama(model / "snapshots" / "main", rng.randrange(1, 3)), model / "blobs"
    blobs.mkdir()
    for path in sorted(model.iterdir()):
        blob = blobs / str(rng.getrandbits(64))
        path.rename(blob)
        if rng.random() < 0.5:
            blob.with_suffix(".link").symlink_to(blob.name)
            blob = blob.with_suffix(".link")
        path.symlink_to(f"../../blobs/{blob.name}")
    wanted = {n: a.tobytes() for n, a in toys.llama_arrays().items()}
    with CheckpointSource(model) as source:
        sizes = {n: info.shape[0] for n, info in source.infos.items()}
        same = {n: source.rows(n, 0, rows) for n, rows in sizes.items()} == wanted
    return None if same else "other bytes"


MAKERS = {
    "snapshot": _snapshot,
    "sketch": _sketch,
    "delta": _delta,
    "gguf": _gguf,
    "safetensors": _foreign,
}


def run_valid(setting: Setting) -> Outcome:
    """S2: every maker in turn; good ones are those that were taken."""
    count, most = Count(), setting.pick(200, 240, 1000)
    for number in count.until(setting, range(most), 200):
        kind = list(MAKERS)[number % len(MAKERS)]
        rng, folder = setting.rng(f"S2-{number}"), setting.room(f"valid-{number}")
        try:
            problem = MAKERS[kind](folder, rng)
        except SketchconvError as error:
            problem = str(error)
        count.add(problem and f"{kind} {number}: {problem}")
    return count.outcome()


def run_agreement(setting: Setting) -> Outcome:
    """S4: mutants of a checkpoint that we take; good ones safetensors reads alike."""
    count, make = Count(), safetensors_target(setting.room("agree"))[0]
    most, tried = setting.pick(500, 5000, 50_000), 0
    for number in count.until(setting, range(most), 200):
        tried += 1
        path = make(setting.rng(f"S4-{number}")) / "model.safetensors"
        problem = _differs(path)
        if problem != "-":
            count.add(problem and f"mutant {number}: {problem}")
    for number, dims in enumerate([(), (0,), (1, 1, 1), (0, 2**63), (2, 0, 7), (1,) * 12]):
        size = int(np.prod(dims, dtype=object))
        text = f'{{"a":{{"dtype":"U8","shape":{list(dims)},"data_offsets":[0,{size}]}}}}'.encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
        problem = _differs(path)
        if problem != "-":
            count.add(problem and f"shape {number}: {problem}")
    count.notes.append(f"{tried} mutants were tried; those that we refuse are not counted")
    return count.outcome()


def run_flips(setting: Setting) -> Outcome:
    """R6: one byte changed to another value, half of them in headers; `verify` must find it."""
    count, room = Count(), setting.room("flips")
    mixed = toys.toys().make_toy(rows=1, columns=6, groups=2, bits=(2, 3))
    paths = [mixed.bundle(room / "a.sktch"), toys.delta(room / "d.sktch")]
    paths += sorted(mixed.folder(room / "m", 60).glob("*.safetensors"))
    for number in count.until(setting, range(setting.pick(300, 1500, 10_000)), 100):
        rng, path = setting.rng(f"R6-{number}"), paths[number % len(paths)]
        good = path.read_bytes()
        header = 8 + int.from_bytes(good[:8], "little")
        at = rng.randrange(header) if rng.random() < 0.5 else rng.randrange(header, len(good))
        data = bytearray(good)
        data[at] ^= rng.randrange(1, 256)
        path.write_bytes(data)
        whole = path if path.suffix == ".sktch" else path.parent
        try:
            with alarm():
                found = bool(verify(whole).findings)
        except SketchconvError:
            found = True
        path.write_bytes(good)
        count.add(None if found else f"flip {number}: {path.name} byte {at} -> {data[at]} unseen")
    return count.outcome()


def run_decoder(setting: Setting) -> Outcome:
    """R12: every weight of random sketches through `spec/decode.py`, compared bit for bit."""
    count, room = Count(), setting.room("decode")
    for number in range(setting.pick(8, 60, 300)):
        rng = setting.rng(f"R12-{number}")
        toy = toys.toys().make_mixed() if number % 8 == 7 else random_toy(rng)
        path = toy.bundle(room / f"{number}.sktch")
        file = toys.decoder().File(path)
        with SktchModel.open(path) as model:
            for name in model.manifest.sketches:
                rows = file.rows(name)
                theirs = b"".join(struct.pack(f"<{len(row)}f", *row) for row in rows)
                same = theirs == model.decode(name).tobytes()
                count.add(None if same else f"sketch {number}: {name} differs")
    return count.outcome()


S2 = Row("S2", "random valid files that are taken, with their bytes", "all of >= 200", run_valid)
S4 = Row("S4", "foreign files we take that safetensors reads alike", "all", run_agreement)
R6 = Row("R6", "one changed byte found by verify, half in headers", "10,000 of 10,000", run_flips)
R12 = Row("R12", "weights decoded alike by the independent decoder", "all", run_decoder)
