"""What threads share in compiled code without locks: counters, ordered reads, waiting, jobs.

All is in sequential order: what was written before a `write` is seen after the `read` that sees it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

I32 = ir.IntType(32)
I64 = ir.IntType(64)
ORDER = "seq_cst"


def _word(b: Any, address: Any) -> Any:
    return b.inttoptr(address, I64.as_pointer())


def _fetch_add(typing: Any, address: Any, amount: Any) -> Any:
    """Add to the int64 at `address` and return what was there before."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.atomic_rmw("add", _word(b, args[0]), args[1], ORDER)

    return types.int64(types.int64, types.int64), codegen


def _read(typing: Any, address: Any) -> Any:
    """The int64 at `address`, with all that was written before it."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.load_atomic(_word(b, args[0]), ORDER, 8)

    return types.int64(types.int64), codegen


def _write(typing: Any, address: Any, value: Any) -> Any:
    """Store an int64 at `address`, after all that was written before it."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        b.store_atomic(args[1], _word(b, args[0]), ORDER, 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def _pause(typing: Any) -> Any:
    """Tell the CPU that this is a waiting loop, where it has an instruction for that."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        declare: Any = cgutils.get_or_insert_function
        target = b.module.triple
        if target.startswith(("x86_64", "i686")):
            kind = ir.FunctionType(ir.VoidType(), [])
            b.call(declare(b.module, kind, "llvm.x86.sse2.pause"), [])
        elif target.startswith(("aarch64", "arm64")):
            kind = ir.FunctionType(ir.VoidType(), [I32])
            b.call(declare(b.module, kind, "llvm.aarch64.hint"), [I32(1)])
        return context.get_dummy_value()

    return types.void(), codegen


def _give_way(typing: Any, address: Any) -> Any:
    """Call the function ``int f(void)`` at `address`: the system's sched_yield."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        b.call(b.inttoptr(args[0], ir.FunctionType(I32, []).as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


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


fetch_add: Any = intrinsic(_fetch_add)
read: Any = intrinsic(_read)
write: Any = intrinsic(_write)
pause: Any = intrinsic(_pause)
give_way: Any = intrinsic(_give_way)
call_span: Any = intrinsic(prefer_literal=True)(_call_span)


@cache
def yield_address() -> int:
    """Address of the system's `sched_yield`, for `give_way`; 0 where there is none."""
    try:
        function = ctypes.CDLL(None).sched_yield
    except (AttributeError, OSError, TypeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


@cache
def address_of(kernel: Any, count: int) -> int:
    """Address of the C form of a compiled function of `count` int64 arguments and no result.

    Compiles it, or loads it from the disk. The cache keeps `kernel`, and so its code, for good.
    """
    result = kernel.get_compile_result(types.void(*[types.int64] * count))
    return int(result.library.get_pointer_to_function(result.fndesc.llvm_cfunc_wrapper_name))


@cache
def entry_of(kernel: Any, count: int) -> Callable[..., None]:
    """The Python form of a compiled function of `count` int64 arguments and no result.

    As `address_of`. It takes integers, by place, and is spared the look at the types of all
    arguments by which the dispatcher finds it: 0.2 us of 1.1, more where that has left the caches.
    """
    result = kernel.get_compile_result(types.void(*[types.int64] * count))
    entry: Callable[..., None] = result.entry_point
    return entry
