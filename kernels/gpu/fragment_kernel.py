"""One kernel for few tokens, in which what each thread holds is spelled out.

Tensors in here have one element for each thread of the program, so that a thread holds just what
`mma.m16n8k16` asks of its lane, and no value passes through shared memory. Lane ``4 * g + t`` looks
up rows `g` and ``g + 8`` of a tile of 16, at the columns that it has loaded itself: neighbours,
though the instruction numbers them otherwise. A sum has no order, as long as `x` is taken alike.

The warps of a program share the columns of the same rows, and their sums are added through shared
memory in the same launch: the same bits in every run.
"""

from __future__ import annotations

import triton.language as tl

from sketchconv.kernels.gpu.fragment_steps import accumulate, loaded, mine, tables
from sketchconv.kernels.gpu.jit import jit
from sketchconv.kernels.gpu.rounding import put


@jit
def fragments(
    x: tl.tensor,
    words: tl.tensor,
    lut: tl.tensor,
    y: tl.tensor,
    tasks: tl.tensor,
    tokens: tl.tensor,
    count: tl.tensor,
    rows: tl.tensor,
    stride: tl.tensor,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    VECTOR: tl.constexpr,
    TILES: tl.constexpr,
    EIGHTS: tl.constexpr,
    WARPS: tl.constexpr,
    SKIP: tl.constexpr,
    TASKS: tl.constexpr,
    ASM: tl.constexpr,
) -> None:
    """`y[token, row] = sum of x[token, column] * value`, for a tile of both.

    Args:
        x: int32 view of 16-bit floats ``[tokens, columns]``, `stride` words apart.
        words: int32 view of the packed index, in device order.
        lut: int32 view of the tables ``[count, rows, GROUPS, 2**BITS]``, of the type of `y`.
        y: ``[tokens, rows]``.
        tasks: int64 ``[tokens]`` under TASKS: the table of each token. Program (i, j) then takes
            all tokens of the task of token j, if that is the first of them.
        tokens, count, rows, stride: the shapes.
        BITS, GROUPS, GROUP: of the sketch; GROUP is the columns of a group.
        VECTOR: words that a thread loads at once, a divisor of the words of a group.
        TILES, EIGHTS: tiles of 16 rows, and of 8 tokens, of a program.
        WARPS: of a program.
        SKIP: not to load absent tokens, which costs where all are there.
        ASM: see `sketchconv.kernels.gpu.permute_tables`.
    """
    if TASKS:
        place = tl.arange(0, 8 * EIGHTS)
        task = tl.load(tasks + tl.program_id(1))
        every = tl.load(tasks + place, mask=place < tokens, other=-1)
        before = tl.sum(((every == task) & (place < tl.program_id(1))).to(tl.int32), 0)
        if (before == 0) & (task >= 0) & (task < count):
            _tile(
                x, words, lut + task * rows * (GROUPS << BITS) // 2, y, tasks, task, 0, tokens,
                rows, stride, BITS, GROUPS, GROUP, VECTOR, TILES, EIGHTS, WARPS, SKIP, TASKS, ASM,
            )  # fmt: skip
    else:
        _tile(
            x, words, lut, y, tasks, 0, tl.program_id(1) * (8 * EIGHTS), tokens,
            rows, stride, BITS, GROUPS, GROUP, VECTOR, TILES, EIGHTS, WARPS, SKIP, TASKS, ASM,
        )  # fmt: skip


@jit
def _tile(
    x: tl.tensor,
    words: tl.tensor,
    lut: tl.tensor,
    y: tl.tensor,
    tasks: tl.tensor,
    task: tl.tensor,
    first: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    stride: tl.tensor,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    VECTOR: tl.constexpr,
    TILES: tl.constexpr,
    EIGHTS: tl.constexpr,
    WARPS: tl.constexpr,
    SKIP: tl.constexpr,
    TASKS: tl.constexpr,
    ASM: tl.constexpr,
) -> None:
    """Tokens `first` and up; under TASKS those of `task` are stored."""
    STEP: tl.constexpr = 4 * VECTOR  # words, or triples of them, of a row in one turn of a warp
    PER: tl.constexpr = GROUP // 32 if BITS == 3 else GROUP * BITS // 32
    CHUNKS: tl.constexpr = (PER + STEP - 1) // STEP
    TURNS: tl.constexpr = (GROUPS * CHUNKS + WARPS - 1) // WARPS
    EDGE: tl.constexpr = PER % STEP != 0 or GROUPS * CHUNKS % WARPS != 0
    thread = tl.arange(0, 32 * WARPS)
    top = tl.program_id(0) * (16 * TILES)
    words += top.to(tl.int64) * (GROUPS * (GROUP * BITS // 32))
    lut += top.to(tl.int64) * (GROUPS << BITS) // 2
    x += tl.cast(first, tl.int64) * stride
    row = mine(thread, rows - top, TILES)
    # Tokens and rows beyond the last repeat it, and are not stored.
    token = thread % 32 // 4
    step = thread // 32
    entries = tables(lut, row, step // CHUNKS, GROUPS, BITS, TILES, ASM)
    found = loaded(words, row, step, thread % 4, GROUPS, GROUP, BITS, VECTOR, TILES, EDGE, ASM)
    sums: tl.tensor = ()
    for _ in tl.static_range(4 * TILES * EIGHTS):
        sums = sums + (tl.zeros((32 * WARPS,), tl.float32),)  # noqa: RUF005
    for _turn in range(TURNS):
        if GROUPS > 1:
            entries = tables(lut, row, step // CHUNKS, GROUPS, BITS, TILES, ASM)
        held = found
        if TURNS > 1:  # one turn ahead; two were no faster
            found = loaded(
                words, row, step + WARPS, thread % 4, GROUPS, GROUP, BITS, VECTOR, TILES, EDGE, ASM
            )
        sums = accumulate(
            sums, held, entries, x, token, tokens - first, stride, step, thread % 4,
            GROUPS, GROUP, BITS, VECTOR, TILES, EIGHTS, EDGE, SKIP, y.dtype.element_ty, ASM,
        )  # fmt: skip
        step += WARPS
    _store(sums, y, tasks, task, top, first, tokens, rows, TILES, EIGHTS, WARPS, TASKS, ASM)


@jit
def _store(
    sums: tl.tensor,
    y: tl.tensor,
    tasks: tl.tensor,
    task: tl.tensor,
    top: tl.tensor,
    first: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    TILES: tl.constexpr,
    EIGHTS: tl.constexpr,
    WARPS: tl.constexpr,
    TASKS: tl.constexpr,
    ASM: tl.constexpr,
) -> None:
    """Add the warps, store: a thread has rows g and g + 8 of tokens 2 t and 2 t + 1."""
    two = tl.arange(0, 2)
    row = tl.arange(0, 8)[:, None, None, None] + 8 * two[None, None, :, None]
    token = 2 * tl.arange(0, 4)[None, :, None, None] + two[None, None, None, :]
    for m in tl.static_range(TILES):
        for n in tl.static_range(EIGHTS):
            total = _added(sums, 4 * (m * EIGHTS + n), WARPS)
            at, out = first + 8 * n + token, top + 16 * m + row
            mask = (at < tokens) & (out < rows)
            if TASKS:
                mask &= tl.load(tasks + at, mask=at < tokens, other=-1) == task
            put(y + (at.to(tl.int64) * rows + out), total, mask, not ASM)


@jit
def _added(sums: tl.tensor, PLACE: tl.constexpr, WARPS: tl.constexpr) -> tl.tensor:
    """Four sums of all warps: ``[8, 4, 2, 2]`` by g, t, row + 8, token + 1."""
    first = tl.join(sums[PLACE], sums[PLACE + 2])
    second = tl.join(sums[PLACE + 1], sums[PLACE + 3])
    return tl.sum(tl.reshape(tl.join(first, second), (WARPS, 8, 4, 2, 2)), 0)
