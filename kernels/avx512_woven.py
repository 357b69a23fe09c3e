"""Three-bit codes in the order `woven`, by AVX-512: each look-up takes its code where it lies.

Half of the look-ups read a word where another byte of its lanes comes first, the other half after a
shift by 4 bits: 2.72 instructions of the units that also shift and multiply for 16 weights, against
3.25 for the planes of the disk and 2.5 for 4-bit codes. Weights leave in the order of the columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from numba.core import cgutils

from sketchconv.kernels.avx512_blocks import Block
from sketchconv.kernels.avx512_ir import I64, VI32, load, lookup, splat
from sketchconv.kernels.woven import BLOCK_BYTES, BLOCK_COLUMNS

WORD = 64  # bytes of the words A, B and C each
WORD_TABLES = slice(3, 6)  # of `load_tables(3)`: the LUT by the nibbles of A, of B and of C


def _words(b: Any, address: Any, byte: int) -> list[Any]:
    """The words A, B and C from byte `byte` of each lane on.

    The last word is shifted: read from there again, it would reach beyond the block, and out of
    DRAM that was no faster.
    """
    words = [load(b, b.add(address, I64(WORD * word + byte)), VI32) for word in range(2)]
    last = load(b, b.add(address, I64(WORD * 2)), VI32)
    return [*words, b.lshr(last, splat(8 * byte)) if byte else last]


def block_weights(b: Any, tables: list[Any], address: Any) -> Iterator[Any]:
    """The 32 vectors of the block at `address`; `tables` are those of `load_tables`."""
    for byte in range(4):
        words = _words(b, address, byte)
        for half in range(2):
            if half:
                words = [b.lshr(word, splat(4)) for word in words]
            for table, word in zip(tables[WORD_TABLES], words, strict=True):
                yield lookup(b, [table], word)
            yield lookup(b, tables[:1], b.xor(b.xor(words[0], words[1]), words[2]))


def woven_block() -> Block:
    """512 columns, never short; its three words are one plane."""

    def weights(b: Any, tables: list[Any], planes: list[Any], left: Any | None) -> Iterator[Any]:
        return block_weights(b, tables, planes[0])

    return Block(tuple(range(BLOCK_COLUMNS)), weights, lines=BLOCK_BYTES // 64)


def for_blocks(b: Any, columns: Any, body: Callable[[Any, Any], None]) -> tuple[Any, Any]:
    """Call `body(byte, column)` for the place of each woven block of a group of `columns`.

    Returns:
        The bytes and the columns of all of them: where the rest, in the order of the disk, begins.
    """
    count = b.udiv(columns, I64(BLOCK_COLUMNS))
    with cgutils.for_range(b, count) as loop:
        body(b.mul(loop.index, I64(BLOCK_BYTES)), b.mul(loop.index, I64(BLOCK_COLUMNS)))
    return b.mul(count, I64(BLOCK_BYTES)), b.mul(count, I64(BLOCK_COLUMNS))
