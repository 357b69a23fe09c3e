"""What a thread of `sketchconv.kernels.gpu.fragment_kernel` does: load, look up, multiply.

Every tensor is ``[threads]``. `ASM` chooses instructions or, in the interpreter, the same by
definition.
"""

from __future__ import annotations

import triton.language as tl

from sketchconv.kernels.gpu.jit import jit
from sketchconv.kernels.gpu.permute_tables import pairs, picks, prmt, split_bytes


@jit
def vector(
    place: tl.tensor, inside: tl.tensor, COUNT: tl.constexpr, SOME: tl.constexpr, ASM: tl.constexpr
) -> tl.tensor:
    """COUNT (1, 2 or 4) words from `place` on, uint32.

    Under SOME zeros where not `inside`, and nothing is read there; else everything is inside.
    """
    if not ASM:
        found: tl.tensor = ()
        for i in tl.static_range(COUNT):
            word = tl.load(place + i, mask=inside, other=0) if SOME else tl.load(place + i)
            found = found + (word.to(tl.uint32, bitcast=True),)  # noqa: RUF005
    elif COUNT == 4:
        # Zeros before the load: without them the registers live on from turn to turn, and spill.
        FOUR: tl.constexpr = (
            "{.reg .pred p; setp.ne.b32 p, $5, 0;"
            " mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; @p "
            if SOME
            else "{"
        )
        found = tl.inline_asm_elementwise(
            FOUR + "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];}",
            "=r,=r,=r,=r,l,r",
            [place.to(tl.int64), inside.to(tl.int32)],
            dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
    elif COUNT == 2:
        TWO: tl.constexpr = (
            "{.reg .pred p; setp.ne.b32 p, $3, 0; mov.b32 $0, 0; mov.b32 $1, 0; @p "
            if SOME
            else "{"
        )
        found = tl.inline_asm_elementwise(
            TWO + "ld.global.nc.v2.b32 {$0, $1}, [$2];}",
            "=r,=r,l,r",
            [place.to(tl.int64), inside.to(tl.int32)],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
    else:
        word = tl.load(place, mask=inside, other=0) if SOME else tl.load(place)
        found = (word.to(tl.uint32, bitcast=True),)
    return found


@jit
def mma(
    a: tl.tensor, b: tl.tensor, c: tl.tensor, DTYPE: tl.constexpr, ASM: tl.constexpr
) -> tl.tensor:
    """`mma.m16n8k16`: four words of `a`, two of `b`, four sums `c`, as its lanes hold them."""
    a0, a1, a2, a3 = a
    b0, b1 = b
    c0, c1, c2, c3 = c
    if not ASM:
        c0, c1 = _emulated(a0, a2, b0, b1, c0, c1, DTYPE)
        c2, c3 = _emulated(a1, a3, b0, b1, c2, c3, DTYPE)
    else:
        TYPE: tl.constexpr = "bf16" if tl.bfloat16 == DTYPE else "f16"
        c0, c1, c2, c3 = tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col.f32." + TYPE + "." + TYPE + ".f32"
            " {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
            [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    return c0, c1, c2, c3


@jit
def _emulated(
    a0: tl.tensor, a1: tl.tensor, b0: tl.tensor, b1: tl.tensor, even: tl.tensor, odd: tl.tensor,
    DTYPE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Eight rows of it: lane ``4 g + t`` has row g of `a`, column g of `b`, sums 2 t, 2 t + 1."""
    WARPS: tl.constexpr = a0.shape[0] // 32
    total = tl.zeros((WARPS, 8, 8), tl.float32)
    for half in tl.static_range(4):
        left = _half(a1 if half >= 2 else a0, half % 2, DTYPE)
        right = _half(b1 if half >= 2 else b0, half % 2, DTYPE)
        left, right = tl.reshape(left, (WARPS, 8, 1, 4)), tl.reshape(right, (WARPS, 1, 8, 4))
        total += tl.sum(left * right, 3)
    first, second = tl.split(tl.reshape(total, (32 * WARPS, 2)))
    return even + first, odd + second


@jit
def _half(pair: tl.tensor, SECOND: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    if tl.bfloat16 == DTYPE:
        wide = (pair & 0xFFFF0000 if SECOND else pair << 16).to(tl.float32, bitcast=True)
    else:
        wide = (pair >> (16 * SECOND) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    return wide.to(tl.float32)


@jit
def mine(thread: tl.tensor, rows: tl.tensor, TILES: tl.constexpr) -> tl.tensor:
    """Rows of the tile that each thread looks up, 2 * TILES of them; the last for those beyond."""
    found: tl.tensor = ()
    for i in tl.static_range(2 * TILES):
        found = found + (tl.minimum(thread % 32 // 4 + 8 * i, rows - 1),)  # noqa: RUF005
    return found


@jit
def tables(
    lut: tl.tensor, row: tl.tensor, group: tl.tensor, GROUPS: tl.constexpr, BITS: tl.constexpr,
    TILES: tl.constexpr, ASM: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Tables of a thread's rows, as `sketchconv.kernels.gpu.permute_tables.split_bytes`."""
    found: tl.tensor = ()
    always = group >= 0
    group = tl.minimum(group, GROUPS - 1)
    for i in tl.static_range(2 * TILES):
        place = lut + ((row[i] * GROUPS + group) << (BITS - 1))
        words = vector(place, always, (1 << BITS) // 2 if BITS < 3 else 4, False, ASM)
        if BITS == 4:
            words = words + vector(place + 4, always, 4, False, ASM)
        found = found + (split_bytes(words, BITS, ASM),)  # noqa: RUF005
    return found


@jit
def loaded(
    words: tl.tensor, row: tl.tensor, step: tl.tensor, lane: tl.tensor, GROUPS: tl.constexpr,
    GROUP: tl.constexpr, BITS: tl.constexpr, VECTOR: tl.constexpr, TILES: tl.constexpr,
    EDGE: tl.constexpr, ASM: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Packed words of a thread's rows in one step: VECTOR for each row and plane."""
    SIZE: tl.constexpr = GROUP * BITS // 32
    PER: tl.constexpr = GROUP // 32 if BITS == 3 else SIZE
    CHUNKS: tl.constexpr = (PER + 4 * VECTOR - 1) // (4 * VECTOR)
    at = (step % CHUNKS * 4 + lane) * VECTOR
    inside = (at < PER) & (step < GROUPS * CHUNKS)
    if not EDGE:  # what is loaded ahead of the end is not looked up
        step = tl.minimum(step, GROUPS * CHUNKS - 1)
        at = (step % CHUNKS * 4 + lane) * VECTOR
    found: tl.tensor = ()
    for i in tl.static_range(2 * TILES):
        place = words + ((row[i] * GROUPS + step // CHUNKS) * SIZE + at)
        for plane in tl.static_range(3 if BITS == 3 else 1):
            word = vector(place + plane * PER, inside, VECTOR, EDGE, ASM)
            found = found + (word,)  # noqa: RUF005
    return found


@jit
def accumulate(
    sums: tl.tensor, held: tl.tensor, entries: tl.tensor, x: tl.tensor, token: tl.tensor,
    tokens: tl.tensor, stride: tl.tensor, step: tl.tensor, lane: tl.tensor, GROUPS: tl.constexpr,
    GROUP: tl.constexpr, BITS: tl.constexpr, VECTOR: tl.constexpr, TILES: tl.constexpr,
    EIGHTS: tl.constexpr, EDGE: tl.constexpr, SKIP: tl.constexpr, DTYPE: tl.constexpr,
    ASM: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Add the products of one step to `sums`: four for each tile and eight tokens."""
    PLANES: tl.constexpr = 3 if BITS == 3 else 1
    # Words of eight codes in a word of the index, or at 3 bits in three.
    EACH: tl.constexpr = 4 if BITS == 3 else 4 // BITS
    PER: tl.constexpr = GROUP // (8 * EACH)
    CHUNKS: tl.constexpr = (PER + 4 * VECTOR - 1) // (4 * VECTOR)
    first = (step % CHUNKS * 4 + lane) * VECTOR
    inside = (first < PER) & (step < GROUPS * CHUNKS)
    place = x + (step // CHUNKS * GROUP + first * (8 * EACH)) // 2
    for v in tl.static_range(VECTOR):
        parts: tl.tensor = ()
        for n in tl.static_range(EIGHTS):
            mask = inside & (token + 8 * n < tokens)
            row = place + tl.minimum(token + 8 * n, tokens - 1).to(tl.int64) * stride
            parts = parts + (_columns(row, mask, v * EACH * 4, EACH, BITS, EDGE or SKIP, ASM),)  # noqa: RUF005
        for e in tl.static_range(EACH):
            for m in tl.static_range(TILES):
                up = _eight(held, entries[2 * m], 2 * m * PLANES, v, e, BITS, ASM)
                down = _eight(held, entries[2 * m + 1], (2 * m + 1) * PLANES, v, e, BITS, ASM)
                added: tl.tensor = ()
                for i in tl.static_range(TILES):
                    for n in tl.static_range(EIGHTS):
                        c = _four(sums, 4 * (i * EIGHTS + n))
                        if i == m:
                            c = _sixteen(up, down, parts[n], 4 * e, c, DTYPE, ASM)
                        added = added + c
                sums = added
    return sums


@jit
def _four(sums: tl.tensor, PLACE: tl.constexpr) -> tl.tensor:
    return sums[PLACE], sums[PLACE + 1], sums[PLACE + 2], sums[PLACE + 3]


@jit
def _columns(
    place: tl.tensor, mask: tl.tensor, FIRST: tl.constexpr, EACH: tl.constexpr, BITS: tl.constexpr,
    SOME: tl.constexpr, ASM: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Words of two columns of `x`, four for each word of codes, in the order of their codes."""
    words: tl.tensor = ()
    for e in tl.static_range(EACH):
        words = words + vector(place + (FIRST + 4 * e), mask, 4, SOME, ASM)
    if BITS < 3:
        # Code j of word e is column e + EACH * j.
        found: tl.tensor = ()
        for e in tl.static_range(EACH):
            for k in tl.static_range(4):
                first, second = words[(e + 2 * k * EACH) // 2], words[(e + (2 * k + 1) * EACH) // 2]
                found = found + (prmt(first, second, 0x7632 if e % 2 else 0x5410, ASM),)  # noqa: RUF005
        words = found
    return words


@jit
def _sixteen(
    up: tl.tensor, down: tl.tensor, b: tl.tensor, FIRST: tl.constexpr, c: tl.tensor,
    DTYPE: tl.constexpr, ASM: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Eight columns of each lane: two instructions."""
    c = mma((up[0], down[0], up[1], down[1]), (b[FIRST], b[FIRST + 1]), c, DTYPE, ASM)
    b = (b[FIRST + 2], b[FIRST + 3])
    return mma((up[2], down[2], up[3], down[3]), b, c, DTYPE, ASM)


@jit
def _eight(
    held: tl.tensor, entries: tl.tensor, FIRST: tl.constexpr, PLACE: tl.constexpr,
    PART: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Four words of two values each: eight columns of a row.

    FIRST is the row's first vector in `held`, PLACE the word of the vector, PART of the words of
    codes in there which.
    """
    if BITS == 4:
        word = held[FIRST][PLACE]
        code, pick = word & 0x77777777, picks(word, ASM)
    elif BITS < 3:
        code = held[FIRST][PLACE] >> (BITS * PART) & (0x33333333 if BITS == 2 else 0x11111111)
        pick = code
    else:
        if PART < 3:
            code = held[FIRST + PART][PLACE] & 0x77777777
        else:
            code = held[FIRST][PLACE] >> 3 & 0x11111111
            code |= held[FIRST + 1][PLACE] >> 2 & 0x22222222
            code |= held[FIRST + 2][PLACE] >> 1 & 0x44444444
        pick = code
    a, b = pairs(code, pick, entries, BITS, ASM)
    c, d = pairs(code >> 16, pick >> 16, entries, BITS, ASM)
    return a, b, c, d
