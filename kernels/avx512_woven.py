"""Three-bit codes in the order `woven`, by AVX-512: each look-up takes its code where it lies.

Half of the look-ups read a word where another byte of its lanes comes first, the other half after a
shift by 4 bits: 2.72 instructions of the units that also shift and multiply for 16 weights, against
3.25 for the planes of the disk and 2.5 for 4-bit codes; 3 in the blocks of 64 columns. Weights
leave in the order of the columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from sketchconv.kernels.avx512_blocks import Block
from sketchconv.kernels.avx512_ir import I64, LANES, VI32, load, lookup, splat
from sketchconv.kernels.woven import BLOCK_BYTES, BLOCK_COLUMNS, SHORT_COLUMNS

WORD = 64  # bytes of the words A, B and C each
SHORT_WORD = 8  # the same in a short block
WORD_TABLES = slice(3, 6)  # of `load_tables(3)`: the LUT by the nibbles of A, of B and of C


def _words(b: Any, address: Any, byte: int) -> list[Any]:
    """The words A, B and C from byte `byte` of each lane on.

    The last word is shifted: read from there again, it would reach beyond the block, and out of
    DRAM that was no faster.
    """
    words = [load(b, b.add(address, I64(WORD * word + byte)), VI32) for word in range(2)]
    last = load(b, b.add(address, I64(WORD * 2)), VI32)
    return [*words, b.lshr(last, splat(8 * byte)) if byte else last]


def _values(b: Any, tables: list[Any], words: list[Any]) -> Iterator[Any]:
    """The four vectors of the lowest nibbles of the words A, B and C."""
    for table, word in zip(tables[WORD_TABLES], words, strict=True):
        yield lookup(b, [table], word)
    yield lookup(b, tables[:1], b.xor(b.xor(words[0], words[1]), words[2]))


def block_weights(b: Any, tables: list[Any], address: Any) -> Iterator[Any]:
    """The 32 vectors of the block at `address`; `tables` are those of `load_tables`."""
    for byte in range(4):
        words = _words(b, address, byte)
        for half in range(2):
            if half:
                words = [b.lshr(word, splat(4)) for word in words]
            yield from _values(b, tables, words)


def short_weights(b: Any, tables: list[Any], address: Any) -> Iterator[Any]:
    """The 4 vectors of the short block at `address`."""
    kind = ir.IntType(64)
    everywhere = ir.Constant(ir.VectorType(ir.IntType(32), 8), [0] * 8)
    empty = ir.Constant(ir.VectorType(kind, 1), ir.Undefined)
    shifts = ir.Constant(VI32, [4 * (lane // 2) for lane in range(LANES)])
    words = []
    for word in range(3):
        one = load(b, b.add(address, I64(SHORT_WORD * word)), empty.type)
        words.append(b.lshr(b.bitcast(b.shuffle_vector(one, empty, everywhere), VI32), shifts))
    yield from _values(b, tables, words)


READERS = {BLOCK_COLUMNS: block_weights, SHORT_COLUMNS: short_weights}


def woven_block(columns: int) -> Block:
    """512 or 64 columns, never short; its three words are one plane."""
    read, lines = READERS[columns], -(-columns * BLOCK_BYTES // (BLOCK_COLUMNS * WORD))

    def weights(b: Any, tables: list[Any], planes: list[Any], left: Any | None) -> Iterator[Any]:
        return read(b, tables, planes[0])

    return Block(tuple(range(columns)), weights, lines=lines)


def for_blocks(b: Any, columns: Any, body: Callable[[int, Any, Any], None]) -> tuple[Any, Any]:
    """Call `body(size, byte, column)` for each woven block of a group of `columns`.

    `size` is the number of its columns, `byte` and `column` are its place.

    Returns:
        The bytes and the columns of all of them: where the rest, in the order of the disk, begins.
    """
    done: Any = I64(0)
    for size in READERS:
        first = done
        count = b.udiv(b.sub(columns, first), I64(size))
        with cgutils.for_range(b, count) as loop:
            column = b.add(first, b.mul(loop.index, I64(size)))
            body(size, _bytes(b, column), column)
        done = b.add(first, b.mul(count, I64(size)))
    return _bytes(b, done), done


def _bytes(b: Any, columns: Any) -> Any:
    return b.lshr(b.mul(columns, I64(3)), I64(3))
