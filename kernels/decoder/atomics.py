"""What threads need to share one token without locks: counters, ordered reads, and waiting."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sketchconv.kernels.decoder.ir import I32, I64, call, pointer

ORDER = "seq_cst"


def _fetch_add(typing: Any, address: Any, amount: Any) -> Any:
    """Add to the int64 at `address` and return what was there before."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.atomic_rmw("add", pointer(b, args[0], I64), args[1], ORDER)

    return types.int64(types.int64, types.int64), codegen


def _read(typing: Any, address: Any) -> Any:
    """The int64 at `address`, with all that was written before it."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.load_atomic(pointer(b, args[0], I64), ORDER, 8)

    return types.int64(types.int64), codegen


def _write(typing: Any, address: Any, value: Any) -> Any:
    """Store an int64 at `address`, after all that was written before it."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        b.store_atomic(args[1], pointer(b, args[0], I64), ORDER, 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def _pause(typing: Any) -> Any:
    """Tell the CPU that this is a waiting loop, where it has an instruction for that."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        target = b.module.triple
        if target.startswith(("x86_64", "i686")):
            call(b, "llvm.x86.sse2.pause", ir.VoidType(), [])
        elif target.startswith(("aarch64", "arm64")):
            call(b, "llvm.aarch64.hint", ir.VoidType(), [I32(1)])
        return context.get_dummy_value()

    return types.void(), codegen


def _give_way(typing: Any, address: Any) -> Any:
    """Call the function ``int f(void)`` at `address`: the system's sched_yield."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        b.call(pointer(b, args[0], ir.FunctionType(I32, [])), [])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


fetch_add: Any = intrinsic(_fetch_add)
read: Any = intrinsic(_read)
write: Any = intrinsic(_write)
pause: Any = intrinsic(_pause)
give_way: Any = intrinsic(_give_way)
