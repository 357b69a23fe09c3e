"""Blocks of ggml: bytes against the plain reference, weights and errors against ggml itself."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest

from sketchconv.kernels.ggml import blocks
from sketchconv.kernels.ggml.kinds import KINDS

sys.path.append(str(Path(__file__).parent.parent))
import ggml_oracle
import models

COLUMNS = 512
needs_ggml = pytest.mark.skipif(ggml_oracle.library() is None, reason="xllamacpp is not installed")
every_kind = pytest.mark.parametrize("kind", KINDS)


def column_weights(seed: int = 1) -> np.ndarray:
    """Log-normal importances, some of them zero."""
    rng = np.random.default_rng(seed)
    weights = np.exp(rng.standard_normal(COLUMNS)).astype(np.float32)
    weights[rng.random(COLUMNS) < 0.1] = 0
    weights[:32] = 0  # a whole sub-block that is never used
    return weights


@cache
def hard_rows() -> dict[str, np.ndarray]:
    """Rows that break scale searches."""
    rng = np.random.default_rng(0)
    gaussian = rng.standard_normal(COLUMNS)
    one, outlier = np.zeros(COLUMNS), gaussian * 1e-3
    one[7], outlier[300] = 50, -8
    rows = {
        "gaussian": gaussian,
        "zeros": np.zeros(COLUMNS),
        "constant": np.full(COLUMNS, 0.37),
        "negative constant": np.full(COLUMNS, -0.37),
        "one value": one,
        "outlier": outlier,
        "two values": np.where(gaussian > 0, 1, -1.0),
        "three values": np.round(gaussian).clip(-1, 1),
        "ties": np.round(gaussian * 2) / 2,
        "positive": np.abs(gaussian) + 0.5,
        "negative": -np.abs(gaussian) - 3,
        "far from zero": gaussian * 0.01 + 1,
        "ramp": np.linspace(-1, 1, COLUMNS),
        "below float16": gaussian * 1e-9,
        "subnormal": gaussian * 3e-7,
        "denormal": gaussian * 1e-40,
        "large": gaussian * 1e4,
        "scales": gaussian * np.repeat(10.0 ** rng.integers(-4, 3, COLUMNS // 32), 32),
        "sparse": np.where(rng.random(COLUMNS) < 0.05, gaussian, 0),
    }
    return {name: row.astype(np.float32) for name, row in rows.items()}


def all_hard() -> np.ndarray:
    return np.stack(list(hard_rows().values()))


def squared_error(found: np.ndarray, rows: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Weighted squared error of each row, in float64."""
    gap = (found.astype(np.float64) - rows) ** 2
    return (gap if weights is None else gap * weights).sum(axis=1)


def test_the_table_agrees_with_gguf():
    for name, kind in KINDS.items():
        number = gguf.GGMLQuantizationType[name]
        assert kind.number == number
        assert (kind.columns, kind.nbytes) == gguf.GGML_QUANT_SIZES[number]


@every_kind
@pytest.mark.parametrize("weighted", [False, True])
def test_compiled_blocks_are_those_of_the_plain_search(kind, weighted):
    weights = column_weights() if weighted else None
    rows = all_hard()
    assert np.array_equal(
        blocks.encode(kind, rows, weights), blocks.encode_plain(kind, rows, weights)
    )


@every_kind
def test_bytes_do_not_depend_on_threads_or_neighbours(kind):
    rows = np.random.default_rng(2).standard_normal((171, COLUMNS)).astype(np.float32)
    rows = np.concatenate([rows, all_hard()])
    weights = column_weights()
    one = blocks.encode(kind, rows, weights, threads=1)
    assert np.array_equal(one, blocks.encode(kind, rows, weights, threads=3))
    alone = np.concatenate([blocks.encode(kind, row[None], weights) for row in rows[:9]])
    assert np.array_equal(one[:9], alone)


@every_kind
@pytest.mark.parametrize("count", [1, 3])
def test_blocks_that_fill_no_tile_are_those_of_the_plain_search(kind, count):
    rows = np.random.default_rng(7).standard_normal((count, KINDS[kind].columns))
    rows = rows.astype(np.float32)
    assert np.array_equal(blocks.encode(kind, rows), blocks.encode_plain(kind, rows))


@every_kind
def test_equal_weights_are_no_weights(kind):
    rows = all_hard()
    plain = blocks.encode(kind, rows)
    assert np.array_equal(plain, blocks.encode(kind, rows, np.full(COLUMNS, 0.1, np.float32)))
    assert np.array_equal(plain, blocks.encode(kind, rows, np.zeros(COLUMNS, np.float32)))


def random_blocks(kind: str) -> np.ndarray:
    """Any bytes: scales of every sign, subnormal, infinite and NaN among them."""
    size = COLUMNS // KINDS[kind].columns * KINDS[kind].nbytes
    return np.random.default_rng(3).integers(0, 256, (400, size), dtype=np.uint8)


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    both_nan = np.isnan(one) & np.isnan(other)
    return bool(((one.view(np.uint32) == other.view(np.uint32)) | both_nan).all())


@every_kind
@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_decoded_weights_have_the_bits_of_gguf_py(kind):
    data = random_blocks(kind)
    theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    assert same_bits(blocks.decode_plain(kind, data, COLUMNS), theirs)
    assert same_bits(blocks.decode(kind, data, COLUMNS, threads=1), theirs)
    assert same_bits(blocks.decode(kind, data, COLUMNS, threads=3), theirs)


@needs_ggml
@every_kind
@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_decoded_weights_have_the_bits_of_ggml(kind):
    data = random_blocks(kind)
    assert same_bits(blocks.decode(kind, data, COLUMNS), ggml_oracle.decode(kind, data, COLUMNS))


@cache
def real_rows() -> np.ndarray:
    """Rows of three matrices of MiniLM, or nothing where the model is not there."""
    if not models.MINILM.path.exists():
        return np.zeros((0, 256), np.float32)
    from safetensors.numpy import load_file

    tensors = load_file(models.MINILM.path / "model.safetensors")
    found = [t for name, t in sorted(tensors.items()) if "layer.2." in name and t.ndim == 2]
    return np.concatenate([t[:48, :256] for t in found]).astype(np.float32)


def peers_rows(source: str) -> np.ndarray:
    rng = np.random.default_rng(4)
    if source == "gaussian":
        return rng.standard_normal((96, COLUMNS)).astype(np.float32)
    if source == "heavy":
        return rng.standard_t(3, (96, COLUMNS)).astype(np.float32)
    return real_rows()


@needs_ggml
@every_kind
@pytest.mark.parametrize("source", ["gaussian", "heavy", "real"])
@pytest.mark.parametrize("weighted", [False, True])
def test_errors_are_below_those_of_llama_cpp(kind, source, weighted):
    rows = peers_rows(source)
    if not len(rows):
        pytest.skip("MiniLM is not fetched")
    columns = rows.shape[1]
    weights = column_weights(5)[-columns:] if weighted else None
    ours = ggml_oracle.decode(kind, blocks.encode(kind, rows, weights), columns)
    theirs = ggml_oracle.decode(kind, ggml_oracle.encode(kind, rows, weights), columns)
    mine, peer = (squared_error(found, rows, weights).sum() for found in (ours, theirs))
    assert mine < peer


@needs_ggml
@every_kind
def test_hard_rows_lose_no_more_than_with_llama_cpp(kind):
    """But for what rounding a scale to float16 takes, and 1 % of the error where codes decide."""
    rows = all_hard()
    ours = squared_error(blocks.decode(kind, blocks.encode(kind, rows), COLUMNS), rows, None)
    theirs = ggml_oracle.decode(kind, ggml_oracle.encode(kind, rows), COLUMNS)
    peer, size = squared_error(theirs, rows, None), (rows.astype(np.float64) ** 2).sum(axis=1)
    assert (ours <= 1.02 * peer + 2.0**-22 * size).all()


@every_kind
def test_no_row_is_worse_than_zeros(kind):
    rows = all_hard()
    found = blocks.decode(kind, blocks.encode(kind, rows), COLUMNS)
    size = (rows.astype(np.float64) ** 2).sum(axis=1)
    assert (squared_error(found, rows, None) <= size).all()
    assert not found[list(hard_rows()).index("zeros")].any()


@pytest.mark.parametrize("kind", [name for name in KINDS if not name.startswith("IQ4")])
def test_two_opposite_values_are_kept(kind):
    """The codebook of IQ4 has no opposite levels."""
    row = hard_rows()["two values"][None]
    found = blocks.decode(kind, blocks.encode(kind, row), COLUMNS)
    assert np.abs(found - row).max() < 2.0**-10


@every_kind
def test_an_outlier_in_a_dead_column_costs_nothing(kind):
    row = hard_rows()["gaussian"][None].copy()
    weights = np.ones(COLUMNS, np.float32)
    weights[[40, 300]] = 0
    calm = blocks.decode(kind, blocks.encode(kind, row, weights), COLUMNS)
    row[0, 40], row[0, 300] = 1e3, -1e3
    wild = blocks.decode(kind, blocks.encode(kind, row, weights), COLUMNS)
    error = [squared_error(found, row, weights)[0] for found in (calm, wild)]
    assert error[1] <= 1.05 * error[0]


@every_kind
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_a_value_that_no_block_can_hold_is_named(kind, value):
    rows = np.zeros((5, COLUMNS), np.float32)
    rows[3, 17] = value
    with pytest.raises(ValueError, match=r"row 3, column 17 is .*: " + kind):
        blocks.encode(kind, rows)


@pytest.mark.parametrize(
    ("kind", "rows", "weights", "message"),
    [
        ("Q9_K", np.zeros((1, 256), np.float32), None, "unknown block type 'Q9_K'; known are Q4_0"),
        ("Q4_K", np.zeros((1, 576), np.float32), None, "576 columns, Q4_K takes multiples of 256"),
        ("Q4_0", np.zeros((1, 0), np.float32), None, "0 columns, Q4_0 takes multiples of 32"),
        ("Q4_0", np.zeros((1, 32)), None, "float32 array"),
        ("Q4_0", np.zeros(32, np.float32), None, "float32 array"),
        ("Q4_0", np.zeros((1, 32), np.float32), np.ones(31), r"weights are \(31,\), expected"),
        ("Q4_0", np.zeros((1, 32), np.float32), -np.ones(32), "column 0 is -1.0, must be finite"),
        ("Q4_0", np.zeros((1, 32), np.float32), np.full(32, np.nan), "column 0 is nan"),
    ],
)
def test_wrong_arguments_are_refused(kind, rows, weights, message):
    with pytest.raises(ValueError, match=message):
        blocks.encode(kind, rows, weights)


@pytest.mark.parametrize(
    ("data", "columns", "message"),
    [
        (np.zeros((1, 144), np.uint8), 512, "144 bytes, 512 columns of Q4_K take 288"),
        (np.zeros((1, 144), np.uint8), 250, "250 columns, Q4_K takes multiples of 256"),
        (np.zeros((1, 144), np.int8), 256, "uint8 array"),
    ],
)
def test_wrong_blocks_are_refused(data, columns, message):
    with pytest.raises(ValueError, match=message):
        blocks.decode("Q4_K", data, columns)


@every_kind
def test_no_rows_give_no_blocks(kind):
    empty = blocks.encode(kind, np.zeros((0, COLUMNS), np.float32))
    assert empty.shape == (0, COLUMNS // KINDS[kind].columns * KINDS[kind].nbytes)
    assert blocks.decode(kind, empty, COLUMNS).shape == (0, COLUMNS)


def test_views_that_are_not_contiguous_are_read_as_they_are():
    rows = np.random.default_rng(6).standard_normal((64, 8)).astype(np.float32).T
    assert np.array_equal(
        blocks.encode("Q5_1", rows), blocks.encode("Q5_1", np.ascontiguousarray(rows))
    )
