"""KL divergence of rows of logits and its gradient, in one pass over rows that stay in the cache.

The reference is `kl_rows_plain`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sketchconv.kernels.crew import share
from sketchconv.kernels.jit import inner, jit
from sketchconv.kernels.pointers import carray, pointer_to

BLOCK = 512  # logits at a time: what is computed of them stays in the first cache
LANES = 16
LOWEST = -87.0  # e**x is a normal float32 above


def kl_rows(wanted: Tensor, found: Tensor, scale: float) -> Tensor:
    """KL(softmax(wanted) || softmax(found)) of each row; `found` becomes its gradient.

    Args:
        wanted: bfloat16 ``[rows, vocabulary]``, contiguous in CPU memory.
        found: as `wanted`; overwritten with ``scale * (softmax(found) - softmax(wanted))``.
        scale: factor of the gradient, for instance 1 / tokens.

    Returns:
        float64 ``[rows]``, in nats. Exponentials are good to 2e-7 of their size and sums are
        float32 in 16 lanes of 512 logits, float64 beyond; the same at any number of threads.

    Raises:
        ValueError: dtype, device, layout or shape are others.
    """
    for name, tensor in (("wanted", wanted), ("found", found)):
        if tensor.dtype is not torch.bfloat16 or not tensor.is_cpu or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous bfloat16 on the CPU, got {tensor.dtype}")
    if wanted.dim() != 2 or wanted.shape != found.shape or not wanted.shape[1]:
        raise ValueError(f"rows are {tuple(wanted.shape)} and {tuple(found.shape)}")
    rows, vocabulary = wanted.shape
    out = torch.empty(rows, dtype=torch.float64)
    factor = torch.tensor([scale], dtype=torch.float32)
    args = (wanted.data_ptr(), found.data_ptr(), out.data_ptr(), vocabulary, factor.data_ptr(), 0)
    share(compare_rows, rows, args, torch.get_num_threads())
    return out


def kl_rows_plain(wanted: Tensor, found: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The reference of `kl_rows` in float64: the divergences ``[rows]`` and the gradient."""
    log_wanted = torch.log_softmax(wanted.double(), -1)
    log_found = torch.log_softmax(found.double(), -1)
    mass = log_wanted.exp()
    return (mass * (log_wanted - log_found)).sum(-1), (log_found.exp() - mass) * scale


@inner
def _widen(source: Any, first: int, target: Any) -> None:
    bits = target.view(np.uint32)
    part = source[first : first + target.size]
    for i in range(target.size):
        bits[i] = np.uint32(part[i]) << np.uint32(16)


@inner
def _greatest(source: Any, buffer: Any) -> Any:
    """The greatest value of a bfloat16 row; NaN is passed over."""
    lanes = np.full(LANES, np.float32(-np.inf))
    size = source.size
    for first in range(0, size, BLOCK):
        part = buffer[: min(BLOCK, size - first)]
        _widen(source, first, part)
        for block in range(part.size // LANES):
            values = part[block * LANES : (block + 1) * LANES]
            for lane in range(LANES):
                lanes[lane] = values[lane] if values[lane] > lanes[lane] else lanes[lane]
        for i in range(part.size // LANES * LANES, part.size):
            lanes[0] = max(lanes[0], part[i])
    return lanes.max()


@inner
def _exponentials(values: Any, greatest: Any, powers: Any) -> None:
    """`values` becomes ``e**(values - greatest)``; `powers` is float32 scratch of as many.

    2**n times a polynomial of the rest: Cody and Waite's reduction, Taylor to the sixth power.
    """
    places = powers.view(np.int32)
    for i in range(values.size):
        x = values[i] - greatest
        x = x if x > np.float32(LOWEST) else np.float32(LOWEST)
        shifted = x * np.float32(1.4426950408889634) + np.float32(12582912.0)
        n = shifted - np.float32(12582912.0)  # rounded to the nearest integer
        r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
        p = np.float32(1 / 720) * r + np.float32(1 / 120)
        p = p * r + np.float32(1 / 24)
        p = p * r + np.float32(1 / 6)
        p = p * r + np.float32(0.5)
        p = p * r + np.float32(1)
        values[i] = p * r + np.float32(1)
        places[i] = (np.int32(n) + np.int32(127)) << np.int32(23)
    for i in range(values.size):
        values[i] *= powers[i]


@inner
def _sum(values: Any) -> Any:
    lanes = np.zeros(LANES, np.float32)
    for block in range(values.size // LANES):
        part = values[block * LANES : (block + 1) * LANES]
        for lane in range(LANES):
            lanes[lane] += part[lane]
    for i in range(values.size // LANES * LANES, values.size):
        lanes[0] += values[i]
    total = np.float64(0)
    for lane in range(LANES):
        total += np.float64(lanes[lane])
    return total


@inner
def _narrow(values: Any, target: Any, first: int) -> None:
    """Write values as bfloat16, rounded to nearest, ties to even."""
    bits = values.view(np.uint32)
    part = target[first : first + values.size]
    for i in range(values.size):
        b = bits[i]
        rounded = b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))
        part[i] = np.uint16(rounded >> np.uint32(16))


@jit
def compare_rows(
    begin: int, end: int, wanted: int, found: int, out: int, count: int, scale: int, _none: int
) -> None:
    """Kernel of `kl_rows` for rows from `begin` to `end`; `scale` is the address of a float32."""
    factor = carray(pointer_to(scale, np.float32), (1,))[0]
    losses = carray(pointer_to(out, np.float64), (end,))
    dense, own = np.empty(count, np.float32), np.empty(count, np.float32)
    powers, gaps = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for row in range(begin, end):
        first_row = carray(pointer_to(wanted + 2 * row * count, np.uint16), (count,))
        second_row = carray(pointer_to(found + 2 * row * count, np.uint16), (count,))
        top, own_top = _greatest(first_row, powers), _greatest(second_row, powers)
        mass, own_mass, gain = np.float64(0), np.float64(0), np.float64(0)
        for first in range(0, count, BLOCK):
            size = min(BLOCK, count - first)
            a, b = dense[first : first + size], own[first : first + size]
            gap = gaps[:size]
            _widen(first_row, first, a)
            _widen(second_row, first, b)
            for i in range(size):
                gap[i] = a[i] - b[i]
            _exponentials(a, top, powers[:size])
            _exponentials(b, own_top, powers[:size])
            mass += _sum(a)
            own_mass += _sum(b)
            for i in range(size):
                gap[i] *= a[i]
            gain += _sum(gap)
        apart = np.float64(top) - np.float64(own_top) + np.log(mass) - np.log(own_mass)
        losses[row] = gain / mass - apart
        up, down = factor / np.float32(own_mass), factor / np.float32(mass)
        for first in range(0, count, BLOCK):
            size = min(BLOCK, count - first)
            a, b = dense[first : first + size], own[first : first + size]
            for i in range(size):
                b[i] = b[i] * up - a[i] * down
            _narrow(b, second_row, first)
