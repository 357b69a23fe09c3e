"""Pieces of LLVM IR for vectors of 16 floats, in instructions that every CPU has.

LLVM splits the vectors into whatever registers the machine offers, and `fmuladd` is one
instruction where the CPU has it, a product and a sum elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils

LANES = 16
VECTOR = 4 * LANES  # bytes of 16 float32
F32 = ir.FloatType()
I8 = ir.IntType(8)
I16 = ir.IntType(16)
I32 = ir.IntType(32)
I64 = ir.IntType(64)
SIZES = {"F16": 2, "BF16": 2, "F32": 4}
LOG2_E = 1.4426950408889634
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4  # their sum is ln 2; products with HIGH are exact
ROUNDER = 1.5 * 2.0**23  # added and taken away, it rounds to an integer
EXP_LOW, EXP_HIGH = -87.0, 88.0
EXP_TERMS = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)


def vector(kind: ir.Type, lanes: int = LANES) -> ir.Type:
    """A vector of `lanes` values; one lane stands for a scalar."""
    return ir.VectorType(kind, lanes)


VF32 = vector(F32)


def same(value: float, kind: ir.Type = F32, lanes: int = LANES) -> ir.Constant:
    """A vector that holds `value` in every lane."""
    return ir.Constant(vector(kind, lanes), [value] * lanes)


def spread(b: Any, scalar: Any) -> Any:
    """A float32 scalar in all 16 lanes."""
    one = b.insert_element(ir.Constant(VF32, ir.Undefined), scalar, I32(0))
    zeros = ir.Constant(vector(I32), [0] * LANES)
    return b.shuffle_vector(one, ir.Constant(VF32, ir.Undefined), zeros)


def pointer(b: Any, address: Any, kind: ir.Type) -> Any:
    """Turn a 64-bit address into a pointer to `kind`."""
    return b.inttoptr(address, kind.as_pointer())


def load(b: Any, address: Any, kind: ir.Type) -> Any:
    """Load `kind` from an address that is a multiple of nothing in particular."""
    return b.load(pointer(b, address, kind), align=1)


def store(b: Any, value: Any, address: Any) -> None:
    """Store a value at an address of any alignment."""
    b.store(value, pointer(b, address, value.type), align=1)


def call(b: Any, name: str, result: ir.Type, args: list[Any]) -> Any:
    """Call the LLVM intrinsic `name`."""
    declare: Any = cgutils.get_or_insert_function
    return b.call(declare(b.module, ir.FunctionType(result, [a.type for a in args]), name), args)


def multiply_add(b: Any, x: Any, y: Any, z: Any) -> Any:
    """`x * y + z` in 16 lanes."""
    return call(b, "llvm.fmuladd.v16f32", VF32, [x, y, z])


def local(b: Any, kind: ir.Type) -> Any:
    """A variable of the function; LLVM keeps it in a register."""
    allocate: Any = cgutils.alloca_once
    return allocate(b, kind)


def at(b: Any, address: Any, number: Any, size: int) -> Any:
    """Address of entry `number` where entries take `size` bytes."""
    return b.add(address, b.mul(number, I64(size)))


def loop(b: Any, count: Any, body: Callable[[Any], None]) -> None:
    """Emit ``for number in range(count): body(number)``."""
    with cgutils.for_range(b, count) as made:
        body(made.index)


def vectors(b: Any, columns: Any) -> Any:
    """Vectors of 16 that `columns` entries take."""
    return b.udiv(b.add(columns, I64(LANES - 1)), I64(LANES))


def accumulate(
    b: Any,
    count: Any,
    add: Callable[[Any, Any], None],
    before: Callable[[Any], None] | None = None,
) -> Any:
    """Sum over ``range(count)`` as 16 lanes, in four running sums, so that none waits for another.

    `add` gets a number and the variable to add to; `before` the number before every four.
    """
    sums = zeros(b, 4)
    fours = b.udiv(count, I64(4))

    def four(number: Any) -> None:
        first = b.mul(number, I64(4))
        if before is not None:
            before(first)
        for i, total in enumerate(sums):
            add(b.add(first, I64(i)), total)

    loop(b, fours, four)
    done = b.mul(fours, I64(4))
    loop(b, b.sub(count, done), lambda i: add(b.add(done, i), sums[0]))
    one, two, three, last = (b.load(total) for total in sums)
    return b.fadd(b.fadd(one, two), b.fadd(three, last))


def zeros(b: Any, count: int) -> list[Any]:
    """`count` variables of 16 floats, all zero."""
    made = [local(b, VF32) for _ in range(count)]
    for total in made:
        b.store(ir.Constant(VF32, None), total)
    return made


def widen(b: Any, raw: Any, kind: str, lanes: int = LANES) -> Any:
    """Float32 lanes from the bits of float16, bfloat16 or float32 lanes.

    float16 goes by integers: without F16C its conversion would be a call into a library that is
    not there.
    """
    floats, words = vector(F32, lanes), vector(I32, lanes)
    if kind == "F32":
        return b.bitcast(raw, floats)
    wide = b.zext(raw, words)
    if kind == "BF16":
        return b.bitcast(b.shl(wide, same(16, I32, lanes)), floats)
    sign = b.shl(b.and_(wide, same(0x8000, I32, lanes)), same(16, I32, lanes))
    moved = b.shl(b.and_(wide, same(0x7FFF, I32, lanes)), same(13, I32, lanes))
    normal = b.add(moved, same(112 << 23, I32, lanes))
    special = b.icmp_unsigned(">=", moved, same(0x7C00 << 13, I32, lanes))
    normal = b.select(special, b.add(normal, same(112 << 23, I32, lanes)), normal)
    # A subnormal half is a multiple of 2**-24: count them from 2**-14 on, then take 2**-14 away.
    raised = b.bitcast(b.add(moved, same(113 << 23, I32, lanes)), floats)
    small = b.bitcast(b.fsub(raised, same(2.0**-14, F32, lanes)), words)
    tiny = b.icmp_unsigned("<", moved, same(0x0400 << 13, I32, lanes))
    return b.bitcast(b.or_(b.select(tiny, small, normal), sign), floats)


def load_wide(b: Any, address: Any, kind: str, lanes: int = LANES) -> Any:
    """Load float16, bfloat16 or float32 lanes as float32."""
    raw = load(b, address, vector(I32 if kind == "F32" else I16, lanes))
    return widen(b, raw, kind, lanes)


def exponential(b: Any, x: Any) -> Any:
    """`e ** x` in 16 lanes within 2 units in the last place for -87 to 88.

    Below it is zero, above infinite; NaN stays NaN.
    """
    scaled = multiply_add(b, x, same(LOG2_E), same(ROUNDER))
    whole = b.fsub(scaled, same(ROUNDER))
    rest = multiply_add(b, whole, same(-LN2_HIGH), x)
    rest = multiply_add(b, whole, same(-LN2_LOW), rest)
    value = same(EXP_TERMS[0])
    for term in EXP_TERMS[1:]:
        value = multiply_add(b, value, rest, same(term))
    # The last bits of `scaled` are the whole number: into the exponent with it.
    power = b.shl(b.bitcast(scaled, vector(I32)), same(23, I32))
    result = b.bitcast(b.add(b.bitcast(value, vector(I32)), power), VF32)
    low = b.fcmp_ordered("<", x, same(EXP_LOW))
    high = b.fcmp_ordered(">", x, same(EXP_HIGH))
    result = b.select(low, ir.Constant(VF32, None), result)
    result = b.select(high, same(float("inf")), result)
    return b.select(b.fcmp_unordered("uno", x, x), x, result)


def fold(b: Any, value: Any, join: Any) -> Any:
    """One scalar from 16 lanes: halves joined with halves, an order that no machine changes."""
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        low, high = (
            b.shuffle_vector(value, value, ir.Constant(vector(I32, lanes), list(order)))
            for order in (range(lanes), range(lanes, 2 * lanes))
        )
        value = join(low, high)
    return b.extract_element(value, I32(0))
