"""Words that threads share inside compiled code: atomic adds and loads, a pause, calls by address.

LLVM lowers the atomics on every CPU, all of them in sequential order: what is written before a
store is seen after the load that sees the store.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

I64 = ir.IntType(64)
_X86 = platform.machine().lower() in ("x86_64", "amd64")
_ARM = platform.machine().lower() in ("aarch64", "arm64")


def _word(b: Any, address: Any) -> Any:
    return b.inttoptr(address, I64.as_pointer())


def _add(typing: Any, address: Any, value: Any) -> Any:
    """Add `value` to the int64 at `address`; returns what was there before."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.atomic_rmw("add", _word(b, args[0]), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


def _get(typing: Any, address: Any) -> Any:
    """The int64 at `address`."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.load_atomic(_word(b, args[0]), "seq_cst", 8)

    return types.int64(types.int64), codegen


def _put(typing: Any, address: Any, value: Any) -> Any:
    """Write the int64 at `address`."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        b.store_atomic(args[1], _word(b, args[0]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def _pause(typing: Any) -> Any:
    """Tell the CPU that this thread spins (some tens of nanoseconds); nothing on unknown CPUs."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        declare: Any = cgutils.get_or_insert_function
        if _X86:
            kind = ir.FunctionType(ir.VoidType(), [])
            b.call(declare(b.module, kind, "llvm.x86.sse2.pause"), [])
        elif _ARM:
            kind = ir.FunctionType(ir.VoidType(), [ir.IntType(32)])
            b.call(declare(b.module, kind, "llvm.aarch64.hint"), [ir.Constant(ir.IntType(32), 1)])
        return context.get_dummy_value()

    return types.void(), codegen


def _call_span(typing: Any, function: Any, begin: Any, end: Any, args: Any, count: Any) -> Any:
    """``function(begin, end, *args)`` by address: all int64, no result.

    `args` is the address of the int64 arguments, `count` (a literal) their number.
    """
    number = count.literal_value

    def codegen(context: Any, b: Any, signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [I64] * (2 + number))
        target = b.inttoptr(values[0], kind.as_pointer())
        words = [b.load(_word(b, b.add(values[3], I64(8 * i)))) for i in range(number)]
        b.call(target, [values[1], values[2], *words])
        return context.get_dummy_value()

    word = types.int64
    return types.void(word, word, word, word, count), codegen


add: Any = intrinsic(_add)
get: Any = intrinsic(_get)
put: Any = intrinsic(_put)
pause: Any = intrinsic(_pause)
give_way: Any = types.ExternalFunction("sched_yield", types.int32())
call_span: Any = intrinsic(prefer_literal=True)(_call_span)


def address_of(kernel: Any, count: int) -> int:
    """Address of the C form of a compiled function of `count` int64 arguments and no result.

    `call_span` calls it. The kernel keeps the code alive.
    """
    signature = types.void(*[types.int64] * count)
    kernel.compile(signature.args)
    result = kernel.get_compile_result(signature)
    return int(result.library.get_pointer_to_function(result.fndesc.llvm_cfunc_wrapper_name))
