"""Arrays at raw addresses inside compiled code, so that a call costs a microsecond."""

from __future__ import annotations

from typing import Any

import numba.np.numpy_support
from numba import types
from numba.extending import intrinsic

carray: Any = numba.np.numpy_support.carray


def _pointer_to(typing: Any, address: Any, dtype: Any) -> Any:
    """Turn an integer address into a pointer to `dtype`, for `numba.carray`.

    The caller keeps the memory alive and vouches for its size.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    pointer: Any = types.CPointer
    return pointer(dtype.instance_type)(types.int64, dtype), codegen


pointer_to: Any = intrinsic(_pointer_to)
