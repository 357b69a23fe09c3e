"""Explicit vectors inside compiled kernels: helpers that build LLVM's target-independent IR.

LLVM neither reorders nor fuses what is written this way, and every machine splits or joins the
vectors as its registers allow. So the results are the same everywhere, which fastmath and
automatic vectorisation of sums would not give.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types as numba_types
from numba.core import cgutils as numba_cgutils
from numba.extending import intrinsic as numba_intrinsic

# The types that Numba declares for these do not fit the way in which it calls them.
types: Any = numba_types
cgutils: Any = numba_cgutils

I8 = ir.IntType(8)
I32 = ir.IntType(32)
I64 = ir.IntType(64)
F32 = ir.FloatType()
F64 = ir.DoubleType()


def intrinsic(function: Callable[..., Any]) -> Any:
    """Make a function for compiled code out of one that builds IR."""
    build: Any = numba_intrinsic
    return build(function)


def vector(kind: Any, lanes: int) -> Any:
    """The vector type of `lanes` elements of `kind`."""
    return ir.VectorType(kind, lanes)


def constant(kind: Any, value: Any) -> Any:
    """The constant vector of type `kind` with every lane `value`."""
    return ir.Constant(kind, [value] * kind.count)


def splat(builder: Any, scalar: Any, lanes: int) -> Any:
    """A vector with `scalar` in every lane."""
    kind = vector(scalar.type, lanes)
    empty = ir.Constant(kind, ir.Undefined)
    one = builder.insert_element(empty, scalar, I32(0))
    return builder.shuffle_vector(one, empty, constant(vector(I32, lanes), 0))


def data_of(context: Any, builder: Any, signature: Any, args: Any) -> list[Any]:
    """Data pointers of array arguments; other arguments unchanged."""
    return [
        context.make_array(kind)(context, builder, arg).data if hasattr(kind, "ndim") else arg
        for kind, arg in zip(signature.args, args, strict=True)
    ]


def slot(builder: Any, data: Any, kind: Any, offset: Any) -> Any:
    """Pointer to a value of type `kind`, `offset` elements of its scalar type after `data`."""
    scalar = kind.element if isinstance(kind, ir.VectorType) else kind
    base = builder.bitcast(data, scalar.as_pointer())
    return builder.bitcast(builder.gep(base, [offset]), kind.as_pointer())


def load(builder: Any, data: Any, kind: Any, offset: Any) -> Any:
    """Unaligned load; see `slot`."""
    return builder.load(slot(builder, data, kind, offset), align=1)


def gather(builder: Any, data: Any, kind: Any, offsets: list[Any]) -> Any:
    """A vector of the elements at `offsets`, loaded one by one.

    Written to memory one by one and read back as a vector, they would wait for the store buffer.
    """
    values = ir.Constant(kind, ir.Undefined)
    for lane, offset in enumerate(offsets):
        value = load(builder, data, kind.element, offset)
        values = builder.insert_element(values, value, I32(lane))
    return values


def store(builder: Any, value: Any, data: Any, offset: Any) -> None:
    """Unaligned store; see `slot`."""
    builder.store(value, slot(builder, data, value.type, offset), align=1)


def blocks(
    builder: Any,
    size: Any,
    lanes: int,
    carried: Sequence[Any],
    body: Callable[[Any, list[Any]], Sequence[Any]],
) -> list[Any]:
    """Loop over the whole blocks of `lanes` elements in `size`, carrying values in registers.

    ``body(offset, values)`` returns the next values; the last ones are the result.
    """
    slots = [cgutils.alloca_once_value(builder, value) for value in carried]
    with cgutils.for_range(builder, builder.udiv(size, I64(lanes))) as loop:
        offset = builder.mul(loop.index, I64(lanes))
        values = body(offset, [builder.load(s) for s in slots])
        for place, value in zip(slots, values, strict=True):
            builder.store(value, place)
    return [builder.load(s) for s in slots]


def lane_sum(builder: Any, values: Any) -> Any:
    """Sum of the lanes from the lowest to the highest."""
    total = builder.extract_element(values, I32(0))
    for lane in range(1, values.type.count):
        total = builder.fadd(total, builder.extract_element(values, I32(lane)))
    return total


def running_sum(builder: Any, values: Any) -> Any:
    """Sum of each lane and all lower ones, by doubling strides."""
    kind = values.type
    zero = constant(kind, 0.0)
    stride = 1
    while stride < kind.count:
        lanes = [i - stride + kind.count if i >= stride else 0 for i in range(kind.count)]
        shifted = builder.shuffle_vector(zero, values, ir.Constant(vector(I32, kind.count), lanes))
        values = builder.fadd(values, shifted)
        stride *= 2
    return values
