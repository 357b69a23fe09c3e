"""Small sketches of every kind of table, and tuned tables for them."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sketchconv.formats.sketches import SketchRecord
from sketchconv.formats.tensors import f32_to_bf16

_TOYS = Path(__file__).resolve().parents[1] / "formats" / "conftest.py"
_spec = importlib.util.spec_from_file_location("toys", _TOYS)
_toys = importlib.util.module_from_spec(_spec)
sys.modules["toys"] = _toys
_spec.loader.exec_module(_toys)


def carried(values, lut):
    """Float32 in the carrier of a dtype."""
    if lut == "BF16":
        return f32_to_bf16(np.asarray(values, np.float32))
    return np.asarray(values, np.float16 if lut == "F16" else np.float32)


def make_toy(lut="F16", **options):
    """The toy of the format's tests, with tables of one dtype."""
    toy = _toys.make_toy(**options)
    toy.records = [replace(r, lut_dtype=lut) for r in toy.records]
    toy.luts = {n: carried(t.astype(np.float32), lut) for n, t in toy.luts.items()}
    return toy


def make_mixed():
    """Tables of F16, BF16 and F32, and two shaped sketches, in one model."""
    toy = make_toy(rows=4, columns=64, groups=2, bits=(2, 3, 4, 5))
    rng = np.random.default_rng(6)
    for record, lut in zip(list(toy.records), ("BF16", "F32", "F16", "F16"), strict=True):
        at = toy.records.index(record)
        toy.records[at] = replace(record, lut_dtype=lut)
        toy.luts[record.name] = carried(toy.luts[record.name].astype(np.float32), lut)
    for bits, grid, fields in ((4, "affine", 2), (8, "symmetric", 1)):
        record = SketchRecord(f"s.{bits}.weight", (4, 64), "BF16", bits, 2, "F16", grid)
        toy.records.append(record)
        toy.codes[record.name] = rng.integers(0, 2**bits, (4, 2, 32), dtype=np.uint8)
        toy.luts[record.name] = rng.normal(size=(4, 2, fields)).astype(np.float16)
    return toy


def tune(toy, share=0.5, seed=0, names=None):
    """Tables with about a share of their groups moved, by weight."""
    rng, out = np.random.default_rng(seed), {}
    for record in toy.records:
        if names is not None and record.name not in names:
            continue
        table = toy.luts[record.name]
        move = (
            rng.normal(size=table.shape) * 0.02 * (rng.random(table.shape[:2]) < share)[..., None]
        )
        if record.lut_dtype == "BF16":
            plain = (table.astype(np.uint32) << 16).view(np.float32)
            moved = f32_to_bf16((plain + move).astype(np.float32))
        else:
            moved = (table.astype(np.float64) + move).astype(table.dtype)
        out[record.name] = np.where(move != 0, moved, table).astype(table.dtype)
    return out


def content(path):
    """The bytes of a file, or of every file of a folder by its path."""
    path = Path(path)
    if path.is_file():
        return path.read_bytes()
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.fixture(scope="session")
def tools():
    """The functions of this file, for tests."""
    import types

    return types.SimpleNamespace(
        make_toy=make_toy, make_mixed=make_mixed, tune=tune, content=content, carried=carried
    )


@pytest.fixture(scope="session", params=["bundle", "folder", "shards"])
def mixed(request, tmp_path_factory):
    """A base in each form, with every kind of table: toy and path; read only."""
    toy = make_mixed()
    folder = tmp_path_factory.mktemp("base")
    if request.param == "bundle":
        return toy, toy.bundle(folder / "base.sktch")
    size = 10**9 if request.param == "folder" else 700
    return toy, toy.folder(folder / "base", size)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    """The mixed base as one file: toy and path; read only."""
    toy = make_mixed()
    return toy, toy.bundle(tmp_path_factory.mktemp("bundle") / "base.sktch")
