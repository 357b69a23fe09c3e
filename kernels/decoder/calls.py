"""Kernels by address: called from compiled code that was not compiled for them.

The matrices of a network may have any bits and LUT dtypes; with addresses one compiled loop runs
them all, and compiles once.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sketchconv.kernels.decoder.ir import I8, I64, pointer


def _multiply_at(
    typing: Any,
    address: Any,
    begin: Any,
    end: Any,
    index: Any,
    tables: Any,
    x: Any,
    y: Any,
    rows: Any,
    groups: Any,
    columns: Any,
) -> Any:
    """Call the kernel at `address` for one float32 token; arguments as in `dispatch.Multiply`."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(I8.as_pointer(), [I64] * 11)
        values = [*args[1:7], I64(0), I64(1), *args[7:]]
        b.call(pointer(b, args[0], kind), values)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 10), codegen


def _decode_at(
    typing: Any,
    address: Any,
    begin: Any,
    end: Any,
    index: Any,
    tables: Any,
    ids: Any,
    target: Any,
    groups: Any,
    columns: Any,
) -> Any:
    """Call the kernel at `address`; the arguments are those of `dispatch.Decode`."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(I8.as_pointer(), [I64] * 8)
        b.call(pointer(b, args[0], kind), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9), codegen


multiply_at: Any = intrinsic(_multiply_at)
decode_at: Any = intrinsic(_decode_at)
