"""The work of one chunk of each kind of phase, compiled into `loop.run`."""

from __future__ import annotations

from typing import Any

import numpy as np

from sketchconv.kernels.decoder import layout as at
from sketchconv.kernels.decoder.calls import decode_at, multiply_at
from sketchconv.kernels.decoder.halves import round_half
from sketchconv.kernels.decoder.ir import LANES
from sketchconv.kernels.decoder.lanes import (
    dense_dot,
    dense_row,
    gate,
    mix,
    normalise,
    scores,
    softmax,
)
from sketchconv.kernels.entries import BF16, F16, F32, round_bf16
from sketchconv.kernels.jit import inner
from sketchconv.kernels.pointers import carray, pointer_to


@inner
def _floats(address: int, count: int) -> Any:
    return carray(pointer_to(address, np.float32), (count,))


@inner
def _dense_size(kind: int) -> int:
    return 4 if kind == F32 else 2


@inner
def embed(phase: Any, token: int, token_at: int) -> None:
    """Write the embedding of `token`, which lies at the address `token_at`."""
    index, tables, target = phase[at.E_INDEX], phase[at.E_TABLES], phase[at.E_TARGET]
    columns = phase[at.E_COLUMNS]
    if phase[at.E_KERNEL]:
        groups = phase[at.E_GROUPS]
        decode_at(phase[at.E_KERNEL], 0, 1, index, tables, token_at, target, groups, columns)
        return
    row = index + token * columns * _dense_size(tables)
    if tables == F16:
        dense_row("F16", row, target, columns)
    elif tables == BF16:
        dense_row("BF16", row, target, columns)
    else:
        dense_row("F32", row, target, columns)


@inner
def _product(phase: Any, matrix: int, begin: int, end: int, x: int) -> None:
    """Rows `begin` to `end` of one matrix of a phase times `x`, and their bias."""
    kernel, index = phase[matrix + at.KERNEL], phase[matrix + at.INDEX]
    tables, rows = phase[matrix + at.TABLES], phase[matrix + at.ROWS]
    columns, bias = phase[matrix + at.GROUP_COLUMNS], phase[matrix + at.BIAS]
    y = _floats(phase[matrix + at.Y], rows)
    if kernel:
        groups, target = phase[matrix + at.GROUPS], phase[matrix + at.Y]
        multiply_at(kernel, begin, end, index, tables, x, target, rows, groups, columns)
    else:
        size = columns * _dense_size(tables)
        for row in range(begin, end):
            if tables == F16:
                y[row] = dense_dot("F16", index + row * size, x, columns)
            elif tables == BF16:
                y[row] = dense_dot("BF16", index + row * size, x, columns)
            else:
                y[row] = dense_dot("F32", index + row * size, x, columns)
    if bias:
        more = _floats(bias, rows)
        for row in range(begin, end):
            y[row] += more[row]


@inner
def linear(phase: Any, chunk: int, x: int) -> None:
    """One chunk of rows; the matrices lie one below the other, except with GATE."""
    begin = chunk * phase[at.CHUNK_ROWS]
    end = begin + phase[at.CHUNK_ROWS]
    if phase[at.FINISH] == at.GATE:
        second = at.FIRST + at.MATRIX
        end = min(end, phase[at.FIRST + at.ROWS])
        _product(phase, at.FIRST, begin, end, x)
        _product(phase, second, begin, end, x)
        left, right = phase[at.FIRST + at.Y] + 4 * begin, phase[second + at.Y] + 4 * begin
        gate(left, right, phase[at.TARGET] + 4 * begin, end - begin)
        return
    first = 0
    for number in range(phase[at.COUNT]):
        matrix = at.FIRST + number * at.MATRIX
        rows = phase[matrix + at.ROWS]
        low, high = max(begin - first, 0), min(end - first, rows)
        if low < high:
            _product(phase, matrix, low, high, x)
            if phase[at.FINISH] == at.ADD:
                y, target = _floats(phase[matrix + at.Y], rows), _floats(phase[at.TARGET], rows)
                for row in range(low, high):
                    target[row] += y[row]
        first += rows


@inner
def _rotated(
    source: int, norm: int, eps: Any, cos: Any, sin: Any, room: int, target: int, width: int
) -> Any:
    """One head: its norm, if any, and the rotation by the position, written to `target`."""
    dim = cos.size
    raw, x, y = _floats(source, dim), _floats(room, width), _floats(target, dim)
    for i in range(dim):
        x[i] = raw[i]
    x[dim:] = 0
    if norm:
        normalise(room, norm, room, dim, eps)
    half = dim // 2
    for i in range(half):
        y[i] = x[i] * cos[i] - x[i + half] * sin[i]
    for i in range(half):
        y[i + half] = x[i + half] * cos[i + half] + x[i] * sin[i + half]
    return y


@inner
def _rounded(kind: int, values: Any, store: bool, address: int, step: int) -> None:
    """Round `values` to the cache's dtype and, if `store`, put them `step` entries apart."""
    for i in range(values.size):
        place = address + i * step * _dense_size(kind)
        if kind == F32:
            if store:
                _floats(place, 1)[0] = values[i]
            continue
        if kind == BF16:
            short = round_bf16(values[i])
            wide = np.uint32(short) << np.uint32(16)
            values[i] = np.uint32(wide).view(np.float32)
        else:
            short, values[i] = round_half(values[i])
        if store:
            carray(pointer_to(place, np.uint16), (1,))[0] = short


@inner
def _cached(kind: int, keys: int, values: int, weights: int, shape: Any, work: Any) -> None:
    """Scores of a head with its cached keys, or (`weights`) its values, weighed and summed."""
    dim, width, blocks, count = shape
    query, out = work
    if not weights:
        if kind == F16:
            scores("F16", keys, query, out, dim, blocks)
        elif kind == BF16:
            scores("BF16", keys, query, out, dim, blocks)
        else:
            scores("F32", keys, query, out, dim, blocks)
    elif kind == F16:
        mix("F16", values, weights, out, width, count)
    elif kind == BF16:
        mix("BF16", values, weights, out, width, count)
    else:
        mix("F32", values, weights, out, width, count)


@inner
def attend(phase: Any, real: Any, head: int, position: int, own: int) -> None:
    """Attention of one head to all positions up to `position`, which is put into the cache.

    All heads that share a key work its new position out, but only the first of them stores it; so
    none has to wait, and none reads what another is writing.
    """
    dim, width, kind = phase[at.DIM], phase[at.WIDTH], phase[at.CACHE]
    shared, eps = head // phase[at.SHARE], real[at.EPS]
    stores = head % phase[at.SHARE] == 0
    room, query, key, value = own, own + 4 * width, own + 8 * width, own + 12 * width
    out, table = own + 16 * width, own + 4 * at.OWN_VECTORS * width
    cos = _floats(phase[at.COS] + 4 * dim * position, dim)
    sin = _floats(phase[at.SIN] + 4 * dim * position, dim)
    _rotated(phase[at.Q] + 4 * head * dim, phase[at.Q_NORM], eps, cos, sin, room, query, width)
    new_key = phase[at.K] + 4 * shared * dim
    mine = _rotated(new_key, phase[at.K_NORM], eps, cos, sin, room, key, width)
    new = _floats(value, dim)
    new[:] = _floats(phase[at.V] + 4 * shared * dim, dim)
    size, room_blocks = _dense_size(kind), phase[at.BLOCKS]
    keys = phase[at.KEYS] + shared * room_blocks * LANES * dim * size
    values = phase[at.VALUES] + shared * room_blocks * LANES * width * size
    block, lane = divmod(position, LANES)
    _rounded(kind, mine, stores, keys + (block * dim * LANES + lane) * size, LANES)
    _rounded(kind, new, stores, values + position * width * size, 1)
    shape = (dim, width, block + 1, position)
    _cached(kind, keys, values, 0, shape, (query, table))
    weights = _floats(table, (block + 1) * LANES)
    weights[position] = dense_dot("F32", key, query, dim)
    weights[position + 1 :] = -np.inf
    total = softmax(table, block + 1, real[at.SCALE])
    _cached(kind, keys, values, table, shape, (query, out))
    mixed, result = _floats(out, dim), _floats(phase[at.OUT] + 4 * head * dim, dim)
    last = weights[position]
    for i in range(dim):
        result[i] = (mixed[i] + last * new[i]) / total
