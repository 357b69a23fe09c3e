"""Lookup by byte permutation: the tables of a row as registers, indexed by packed codes themselves.

PRMT picks four of eight bytes by the low three bits of four nibbles. The low bytes of eight 16-bit
entries are two registers and their high bytes are two more, so one word of eight codes, each in a
nibble, is its own selector: two PRMT look up four codes, two more pair their bytes. A table of 16
entries is two such lookups, and a third PRMT that picks between them by the fourth bits.

`ASM` chooses the instruction or, where there is none (the interpreter), the same in integer
operations: all else is one source.
"""

from __future__ import annotations

import triton.language as tl

from sketchconv.kernels.gpu.jit import jit


@jit
def prmt(low: tl.tensor, high: tl.tensor, selector: tl.tensor, ASM: tl.constexpr) -> tl.tensor:
    """Byte `i` of the result is byte ``selector >> 4 * i & 7`` of `low` and `high`: uint32 all.

    The fourth bit of a nibble, which asks for eight copies of the byte's sign, has to be zero.
    """
    if ASM:
        found = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [low, high, selector],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    else:
        found = _byte(low, high, selector, 0) | _byte(low, high, selector, 1)
        found |= _byte(low, high, selector, 2) | _byte(low, high, selector, 3)
    return found


@jit
def _byte(low: tl.tensor, high: tl.tensor, selector: tl.tensor, PLACE: tl.constexpr) -> tl.tensor:
    nibble = tl.to_tensor(selector).to(tl.uint32) >> (4 * PLACE) & 15
    word = tl.where(nibble & 4 != 0, high, low)
    byte = word >> ((nibble & 3) * 8) & 255
    byte = tl.where(nibble & 8 != 0, tl.where(byte & 128 != 0, 255, 0).to(tl.uint32), byte)
    return byte << (8 * PLACE)


@jit
def _entries(lut: tl.tensor, offset: tl.tensor, PLACE: tl.constexpr) -> tl.tensor:
    """Entries 2 * PLACE and the next, as one word; `lut` are int32 pointers."""
    return tl.load(lut + offset + PLACE).to(tl.uint32, bitcast=True)


@jit
def table(lut: tl.tensor, offset: tl.tensor, BITS: tl.constexpr, ASM: tl.constexpr) -> tl.tensor:
    """Low bytes, then high bytes, of the ``2**BITS`` entries at `offset`: eight words.

    Four entries a word; words beyond the table repeat its first, and no selector reaches them.
    """
    words: tl.tensor = ()
    for place in tl.static_range((1 << BITS) // 2):
        words = words + (_entries(lut, offset, place),)  # noqa: RUF005
    return split_bytes(words, BITS, ASM)


@jit
def split_bytes(words: tl.tensor, BITS: tl.constexpr, ASM: tl.constexpr) -> tl.tensor:
    """Words of two entries each as low bytes, then high bytes: eight words, as in `table`."""
    first = words[0]
    second = words[1] if BITS > 1 else first
    l0, h0 = prmt(first, second, 0x6420, ASM), prmt(first, second, 0x7531, ASM)
    l1, h1, l2, h2, l3, h3 = l0, h0, l0, h0, l0, h0
    if BITS > 2:
        l1, h1 = prmt(words[2], words[3], 0x6420, ASM), prmt(words[2], words[3], 0x7531, ASM)
    if BITS > 3:
        l2, h2 = prmt(words[4], words[5], 0x6420, ASM), prmt(words[4], words[5], 0x7531, ASM)
        l3, h3 = prmt(words[6], words[7], 0x6420, ASM), prmt(words[6], words[7], 0x7531, ASM)
    return l0, l1, l2, l3, h0, h1, h2, h3


@jit
def picks(word: tl.tensor, ASM: tl.constexpr) -> tl.tensor:
    """Selectors between two words: byte `i` of the second where the fourth bit of code `i` is 1."""
    if ASM:
        # Else the compiler redoes the masking after the shift by 16: 0.1 instructions per weight.
        picked = tl.inline_asm_elementwise(
            "{.reg .b32 t; shr.u32 t, $1, 1; lop3.b32 $0, t, 0x44444444, 0x32103210, 0xea;}",
            "=r,r",
            [word],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    else:
        picked = (word >> 1 & 0x44444444) | 0x32103210
    return picked


@jit
def pairs(
    code: tl.tensor, pick: tl.tensor, entries: tl.tensor, BITS: tl.constexpr, ASM: tl.constexpr
) -> tl.tensor:
    """Four codes to two words of two values each."""
    l0, l1, l2, l3, h0, h1, h2, h3 = entries
    low, high = prmt(l0, l1, code, ASM), prmt(h0, h1, code, ASM)
    if BITS > 3:
        low = prmt(low, prmt(l2, l3, code, ASM), pick, ASM)
        high = prmt(high, prmt(h2, h3, code, ASM), pick, ASM)
    return prmt(low, high, 0x5140, ASM), prmt(low, high, 0x7362, ASM)


@jit
def _halves(pair: tl.tensor, DTYPE: tl.constexpr, ASM: tl.constexpr) -> tl.tensor:
    if ASM:
        # As one instruction: shifts and conversions here cost a move for every value.
        first, second = tl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;",
            "=h,=h,r",
            [pair],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=1,
        )
        first, second = first.to(DTYPE, bitcast=True), second.to(DTYPE, bitcast=True)
    else:
        first = (pair & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)
        second = (pair >> 16).to(tl.uint16).to(DTYPE, bitcast=True)
    return first, second


@jit
def _eight(
    word: tl.tensor, entries: tl.tensor, BITS: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr
) -> tl.tensor:
    """The values of a word of eight nibbles: ``[rows, words]`` to ``[rows, words, 8]``.

    `word` has codes of three bits at most in the low bits of its nibbles and zeros above, or codes
    of four bits.
    """
    if BITS > 3:
        code, pick = word & 0x77777777, picks(word, ASM)
    else:
        code, pick = word, word
    a, b = pairs(code, pick, entries, BITS, ASM)
    c, d = pairs(code >> 16, pick >> 16, entries, BITS, ASM)
    v0, v1 = _halves(a, DTYPE, ASM)
    v2, v3 = _halves(b, DTYPE, ASM)
    v4, v5 = _halves(c, DTYPE, ASM)
    v6, v7 = _halves(d, DTYPE, ASM)
    # A join appends a dimension: the outermost one is the lowest bit of the place.
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
    odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    return tl.reshape(tl.join(even, odd), (word.shape[0], word.shape[1], 8))


@jit
def _word(place: tl.tensor, inside: tl.tensor, TAIL: tl.constexpr) -> tl.tensor:
    word = tl.load(place, mask=inside, other=0) if TAIL else tl.load(place)
    return word.to(tl.uint32, bitcast=True)


@jit
def values(
    place: tl.tensor,
    inside: tl.tensor,
    entries: tl.tensor,
    BITS: tl.constexpr,
    PER: tl.constexpr,
    TAIL: tl.constexpr,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr,
) -> tl.tensor:
    """Values of a tile of spans, in the order of the columns: ``[rows, columns]``."""
    word = _word(place, inside, TAIL)
    if BITS == 4:
        found = _eight(word, entries, BITS, DTYPE, ASM)
    elif BITS == 3:
        second = _word(place + PER, inside, TAIL)
        third = _word(place + 2 * PER, inside, TAIL)
        last = (word >> 3 & 0x11111111) | (second >> 2 & 0x22222222) | (third >> 1 & 0x44444444)
        found = _four(
            _eight(word & 0x77777777, entries, BITS, DTYPE, ASM),
            _eight(second & 0x77777777, entries, BITS, DTYPE, ASM),
            _eight(third & 0x77777777, entries, BITS, DTYPE, ASM),
            _eight(last, entries, BITS, DTYPE, ASM),
        )
        found = tl.permute(found, (0, 1, 3, 4, 2))
    elif BITS == 2:
        even = _eight(word & 0x33333333, entries, BITS, DTYPE, ASM)
        found = tl.join(even, _eight(word >> 2 & 0x33333333, entries, BITS, DTYPE, ASM))
    else:
        found = _four(
            _eight(word & 0x11111111, entries, BITS, DTYPE, ASM),
            _eight(word >> 1 & 0x11111111, entries, BITS, DTYPE, ASM),
            _eight(word >> 2 & 0x11111111, entries, BITS, DTYPE, ASM),
            _eight(word >> 3 & 0x11111111, entries, BITS, DTYPE, ASM),
        )
    SPAN: tl.constexpr = 32 if BITS == 3 else 32 // BITS
    return tl.reshape(found, (word.shape[0], word.shape[1] * SPAN))


@jit
def _four(a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor) -> tl.tensor:
    """Four tensors side by side in two new last dimensions."""
    return tl.join(tl.join(a, c), tl.join(b, d))
