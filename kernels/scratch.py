"""Scratch: the arrays that a thread uses again for every group it solves."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sketchconv.kernels.atoms import DIGITS
from sketchconv.kernels.histogram import BLOCKS, MOST_BLOCKS, squared_widths
from sketchconv.kernels.partition import Room, make_room

CELLS = 6  # per cluster, of atoms that are too many to price each
PER_BLOCK = 8  # atoms whose density is taken together
MIDDLE, LONG = 512, 2048
SHORT_BINS, LONG_BINS = 512, 1024
# Divisors of the cluster in the rounds after the coarse grid: for weights that all columns share,
# and for those that few columns carry. The shortest rows need three rounds for their quality, and
# long ones can afford them.
TWO_ROUNDS = (5, 20), (3, 16)
THREE_ROUNDS = (4, 8, 32), (2, 8, 32)


class Scratch(NamedTuple):
    """Arrays that a thread uses again for every group of n values and k entries."""

    room: Room
    bounds: NDArray[np.int64]  # [k + 1]
    entries: NDArray[np.float64]  # [k]
    prefix: NDArray[np.float64]  # [3, max(n, bins) + 1]
    widths: tuple[NDArray[np.float64], NDArray[np.float64]]  # squared, of few and many blocks
    density: NDArray[np.float64]  # [blocks]
    places: NDArray[np.int64]  # [blocks + 1]
    edges: NDArray[np.int64]  # [cells + 1]
    rounds: tuple[NDArray[np.int64], NDArray[np.int64]]  # even and uneven, see above
    bins: NDArray[np.uint16]  # [n]
    histogram: NDArray[np.float64]  # [2, bins]
    keys: NDArray[np.uint64]  # [2, n]
    counts: NDArray[np.int64]  # [4, 256]
    atoms: NDArray[np.float64]  # [2, n] values, masses
    cells: NDArray[np.float64]  # [3, cells + 1] prefix sums at the edges
    costs: NDArray[np.float64]  # [2, max(n, cells) + 1]
    paths: NDArray[np.int64]  # [3, max(n, cells) + 1]
    starts: NDArray[np.int32]  # [k + 1, n + 1] in exact mode
    gaps: NDArray[np.float32]  # [n]
    words: NDArray[np.uint32]  # [k] rounded entries, and the same
    cast: NDArray[np.float32]  # as float32
    thresholds: NDArray[np.float32]  # [k, but at least 8]


def make_scratch(n: int, k: int, exact: bool) -> Scratch:
    """A `Scratch` for groups of n values and k entries."""
    bins = LONG_BINS if n >= LONG else SHORT_BINS
    blocks = max(MOST_BLOCKS, n // PER_BLOCK + 1)
    cells = CELLS * k
    rounds = TWO_ROUNDS if MIDDLE <= n < LONG else THREE_ROUNDS
    words = np.zeros(k, np.uint32)
    return Scratch(
        room=make_room(k),
        bounds=np.zeros(k + 1, np.int64),
        entries=np.zeros(k),
        prefix=np.zeros((3, max(n, bins) + 1)),
        widths=(squared_widths(BLOCKS), squared_widths(MOST_BLOCKS)),
        density=np.zeros(blocks),
        places=np.zeros(blocks + 1, np.int64),
        edges=np.zeros(cells + 1, np.int64),
        rounds=(np.array(rounds[0], np.int64), np.array(rounds[1], np.int64)),
        bins=np.zeros(n, np.uint16),
        histogram=np.zeros((2, bins)),
        keys=np.zeros((2, n), np.uint64),
        counts=np.zeros((4, DIGITS), np.int64),
        atoms=np.zeros((2, n)),
        cells=np.zeros((3, cells + 1)),
        costs=np.zeros((2, max(n, cells) + 1)),
        paths=np.zeros((3, max(n, cells) + 1), np.int64),
        starts=np.zeros((k + 1, n + 1) if exact else (0, 0), np.int32),
        gaps=np.zeros(n, np.float32),
        words=words,
        cast=words.view(np.float32),
        thresholds=np.zeros(max(k, 8), np.float32),
    )
