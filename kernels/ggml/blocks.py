"""Rows of weights to ggml blocks and back: the entry points."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sketchconv.kernels.ggml.kinds import Kind, kind_of
from sketchconv.kernels.threads import for_spans

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
LANES = 16
# Weights of a block are used relative to the largest among them; a column that is next to nothing
# beside it still decides between choices that are equal otherwise.
LEAST_WEIGHT = 1e-7


def encode(kind: str, rows: F32, weights: F32 | None = None, threads: int | None = None) -> U8:
    """Blocks of a type of ggml that minimise the weighted squared error of each row.

    Args:
        kind: name of the type, a key of `KINDS`.
        rows: float32 ``[n, columns]``; `columns` a multiple of the columns of a block.
        weights: importance of each column, float32 ``[columns]``, finite and not negative: the
            diagonal of the Hessian, or mean squares of the inputs. None weighs all columns alike,
            which is right for inputs that nothing is known of.
        threads: None means every core that the process may use; the bytes are the same.

    Returns:
        uint8 ``[n, bytes of a row]``.

    Raises:
        ValueError: unknown kind, wrong shape or dtype, a value that is not finite or beyond the
            reach of the type (naming the row), or weights that are no weights.
    """
    from sketchconv.kernels.ggml.encoders import ENCODERS

    known = kind_of(kind)
    rows = checked_rows(known, rows)
    masses = relative_weights(known, rows.shape[1], weights)
    blocks = rows.reshape(-1, known.columns)
    out = np.empty((blocks.shape[0], known.nbytes), np.uint8)
    encoder, size = ENCODERS[kind], sub_block(kind)
    tiles = -(-blocks.size // (size * LANES))
    if tiles:
        for_spans(
            lambda begin, end: encoder(blocks, masses, out, begin, end), tiles, rows.size, threads
        )
    return out.reshape(rows.shape[0], rows.shape[1] // known.columns * known.nbytes)


def encode_plain(kind: str, rows: F32, weights: F32 | None = None) -> U8:
    """The same bytes by NumPy alone: the reference of `encode`."""
    from sketchconv.kernels.ggml import plain
    from sketchconv.kernels.ggml.plans import PLANS
    from sketchconv.kernels.ggml.search import search_arrays

    known, plan = kind_of(kind), PLANS[kind]
    rows = checked_rows(known, rows)
    masses = relative_weights(known, rows.shape[1], weights).reshape(-1)
    spread = np.broadcast_to(masses if masses.size else np.float32(1), rows.shape)
    x, w = (np.ascontiguousarray(a.reshape(-1, plan.size).T) for a in (rows, spread))
    codes, fields = search_arrays(x, w, plan)
    per_block = codes.T.reshape(-1, known.columns).view(np.uint8)
    stored = [field.reshape(len(per_block), -1) for field in fields]
    return plain.PACKERS[kind](per_block, *stored).reshape(rows.shape[0], -1)


def decode(kind: str, blocks: U8, columns: int, threads: int | None = None) -> F32:
    """Weights of blocks, bit for bit those of ggml.

    Args:
        kind: name of the type, a key of `KINDS`.
        blocks: uint8 ``[n, bytes of a row]``.
        columns: weights of a row, a multiple of the columns of a block.
        threads: None means every core that the process may use.

    Returns:
        float32 ``[n, columns]``.

    Raises:
        ValueError: unknown kind, wrong shape or dtype.
    """
    from sketchconv.kernels.ggml.decoders import DECODERS

    known = kind_of(kind)
    data = _checked_blocks(known, blocks, columns).reshape(-1, known.nbytes)
    out = np.empty((data.shape[0], known.columns), np.float32)
    decoder = DECODERS[kind]
    if data.size:
        for_spans(
            lambda begin, end: decoder(data, out, begin, end), data.shape[0], out.size, threads
        )
    return out.reshape(blocks.shape[0], columns)


def decode_plain(kind: str, blocks: U8, columns: int) -> F32:
    """The same weights by NumPy alone: the reference of `decode`."""
    from sketchconv.kernels.ggml import plain

    known = kind_of(kind)
    data = _checked_blocks(known, blocks, columns).reshape(-1, known.nbytes)
    return plain.DECODERS[kind](data).reshape(blocks.shape[0], columns)


def sub_block(kind: str) -> int:
    """Columns that share a scale."""
    from sketchconv.kernels.ggml.plans import PLANS

    return PLANS[kind].size


def relative_weights(kind: Kind, columns: int, weights: F32 | None) -> F32:
    """Weights float32 ``[blocks of a row, columns of a block]``, the largest of each block 1.

    Only ratios within a block matter. Blocks whose weights are all zero get ones; without weights
    the result is empty.

    Raises:
        ValueError: shape or values are no weights.
    """
    shape = (columns // kind.columns, kind.columns)
    if weights is None:
        return np.empty((0, kind.columns), np.float32)
    if weights.shape != (columns,):
        raise ValueError(f"weights are {weights.shape}, expected ({columns},), one per column")
    wide = np.asarray(weights, np.float64)
    if not np.isfinite(wide).all() or (wide < 0).any():
        bad = int(np.argmin(np.isfinite(wide) & (wide >= 0)))
        raise ValueError(f"weight of column {bad} is {wide[bad]}, must be finite and not negative")
    wide = wide.reshape(shape)
    largest = wide.max(axis=1, keepdims=True)
    relative = np.divide(wide, largest, out=np.ones(shape), where=largest > 0)
    floored: F32 = np.maximum(relative, LEAST_WEIGHT).astype(np.float32)
    return floored


def checked_rows(kind: Kind, rows: Any) -> F32:
    """Contiguous `rows`, if the blocks of `kind` can hold them.

    Raises:
        ValueError: wrong dtype or shape, or a value that is not finite or out of reach.
    """
    if not isinstance(rows, np.ndarray) or rows.dtype != np.float32 or rows.ndim != 2:
        raise ValueError("rows must be a float32 array [n, columns]")
    if not rows.shape[1] or rows.shape[1] % kind.columns:
        raise ValueError(
            f"rows have {rows.shape[1]} columns, {kind.name} takes multiples of {kind.columns}"
        )
    high = rows.max(axis=1, initial=0.0)
    low = rows.min(axis=1, initial=0.0)
    fine = (high <= kind.reach) & (low >= -kind.reach)
    if not fine.all():
        row = int(np.argmin(fine))
        column = int(np.argmin(np.abs(rows[row]) <= kind.reach))
        value = float(rows[row, column])
        rule = f"at most {kind.reach:g}" if np.isfinite(value) else "finite"
        raise ValueError(f"row {row}, column {column} is {value}: {kind.name} takes values {rule}")
    return np.ascontiguousarray(rows)


def _checked_blocks(kind: Kind, blocks: Any, columns: int) -> U8:
    if not isinstance(blocks, np.ndarray) or blocks.dtype != np.uint8 or blocks.ndim != 2:
        raise ValueError("blocks must be a uint8 array [n, bytes of a row]")
    if columns < 1 or columns % kind.columns:
        raise ValueError(f"{columns} columns, {kind.name} takes multiples of {kind.columns}")
    size = columns // kind.columns * kind.nbytes
    if blocks.shape[1] != size:
        raise ValueError(
            f"rows have {blocks.shape[1]} bytes, {columns} columns of {kind.name} take {size}"
        )
    return np.ascontiguousarray(blocks)
