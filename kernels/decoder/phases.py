"""The work of one chunk of each kind of phase, compiled into `loop.run`."""

from __future__ import annotations

from typing import Any

import numpy as np

from sketchconv.kernels.decoder import layout as at
from sketchconv.kernels.decoder.attention import mix, scores, softmax
from sketchconv.kernels.decoder.calls import decode_at, multiply_at
from sketchconv.kernels.decoder.halves import round_half
from sketchconv.kernels.decoder.ir import LANES
from sketchconv.kernels.decoder.lanes import (
    add_to,
    dense_dot,
    dense_row,
    gate,
    get,
    normalise,
    put,
)
from sketchconv.kernels.entries import BF16, F16, F32, round_bf16
from sketchconv.kernels.jit import inner


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
    target = phase[matrix + at.Y]
    if kernel:
        groups = phase[matrix + at.GROUPS]
        multiply_at(kernel, begin, end, index, tables, x, target, rows, groups, columns)
    else:
        size = columns * _dense_size(tables)
        for row in range(begin, end):
            if tables == F16:
                put(target, row, dense_dot("F16", index + row * size, x, columns))
            elif tables == BF16:
                put(target, row, dense_dot("BF16", index + row * size, x, columns))
            else:
                put(target, row, dense_dot("F32", index + row * size, x, columns))
    if bias:
        add_to(bias + 4 * begin, target + 4 * begin, end - begin)


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
                y = phase[matrix + at.Y] + 4 * low
                add_to(y, phase[at.TARGET] + 4 * low, high - low)
        first += rows


@inner
def _rotated(
    source: int, norm: int, eps: Any, cos: int, sin: int, room: int, target: int, dim: int
) -> None:
    """One head: its norm, if any, and the rotation by the position, written to `target`."""
    if norm:
        for i in range(dim):
            put(room, i, get(source, i))
        for i in range(dim, (dim + LANES - 1) // LANES * LANES):
            put(room, i, np.float32(0))
        normalise(room, norm, room, dim, eps)
        source = room
    half = dim // 2
    for i in range(half):
        left, right = get(source, i), get(source, i + half)
        put(target, i, left * get(cos, i) - right * get(sin, i))
        put(target, i + half, right * get(cos, i + half) + left * get(sin, i + half))


@inner
def _keep(kind: int, values: int, count: int, store: bool, place: int, step: int) -> None:
    """Round `values` to the cache's dtype and, if `store`, put them `step` entries apart."""
    for i in range(count):
        value = get(values, i)
        if kind == F32:
            if store:
                put(place, i * step, value)
        elif kind == BF16:
            short = round_bf16(value)
            put(values, i, np.uint32(np.uint32(short) << np.uint32(16)).view(np.float32))
            if store:
                put(place, i * step, short)
        else:
            short, value = round_half(value)
            put(values, i, value)
            if store:
                put(place, i * step, short)


@inner
def _score(kind: int, keys: int, query: int, out: int, dim: int, blocks: int) -> None:
    if kind == F16:
        scores("F16", keys, query, out, dim, blocks)
    elif kind == BF16:
        scores("BF16", keys, query, out, dim, blocks)
    else:
        scores("F32", keys, query, out, dim, blocks)


@inner
def _mix(kind: int, values: int, weights: int, out: int, width: int, count: int) -> None:
    if kind == F16:
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
    cos, sin = phase[at.COS] + 4 * dim * position, phase[at.SIN] + 4 * dim * position
    _rotated(phase[at.Q] + 4 * head * dim, phase[at.Q_NORM], eps, cos, sin, room, query, dim)
    _rotated(phase[at.K] + 4 * shared * dim, phase[at.K_NORM], eps, cos, sin, room, key, dim)
    for i in range(dim):
        put(value, i, get(phase[at.V], shared * dim + i))
    size, length = _dense_size(kind), phase[at.BLOCKS] * LANES
    keys = phase[at.KEYS] + shared * length * dim * size
    values = phase[at.VALUES] + shared * length * width * size
    block, lane = position // LANES, position % LANES
    _keep(kind, key, dim, stores, keys + (block * dim * LANES + lane) * size, LANES)
    _keep(kind, value, dim, stores, values + position * width * size, 1)
    _score(kind, keys, query, table, dim, block + 1)
    put(table, position, dense_dot("F32", key, query, dim))
    for i in range(position + 1, (block + 1) * LANES):
        put(table, i, np.float32(-np.inf))
    total = softmax(table, block + 1, real[at.SCALE])
    _mix(kind, values, table, out, width, position)
    last, result = get(table, position), phase[at.OUT] + 4 * head * dim
    for i in range(dim):
        put(result, i, (get(out, i) + last * get(value, i)) / total)
