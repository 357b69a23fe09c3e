"""What the code that launches kernels shares: dtypes, the current device, tuning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

from sketchconv.kernels.gpu.layout import repacked
from sketchconv.kernels.gpu.support import interpreting

ELEMENT = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make `device` the current one: Triton launches there, whatever the tensors are on."""
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def geometry(group: int, bits: int, layout: str, dtype: torch.dtype) -> dict[str, Any]:
    """What every kernel has as constants: the group, the order of its bytes, and the numbers.

    Args:
        group: columns of a group.
        bits: 1 to 8.
        layout: "planes-le" or "device".
        dtype: of the operands of products, or of what is stored.

    Raises:
        ValueError: another layout.
    """
    if layout not in ("planes-le", "device"):
        raise ValueError(f'layout is "{layout}", must be "planes-le" or "device"')
    return {
        "GROUP": group,
        "BITS": bits,
        "REPACKED": layout == "device" and repacked(bits, group),
        "DTYPE": ELEMENT[dtype],
        "WIDE": interpreting(),
    }


def tuned(configs: Sequence[Any], key: Sequence[str]) -> Callable[[Any], Any]:
    """`triton.autotune` of a kernel over `configs`, kept per value of the arguments in `key`.

    The interpreter has nothing to measure with, and takes the first. The kernel itself, for a
    compilation ahead of time, is the attribute `fn` of the result.
    """
    chosen = list(configs[:1] if interpreting() else configs)

    def decorate(kernel: Any) -> Any:
        return triton.autotune(configs=chosen, key=list(key))(kernel)

    return decorate


def bucket(count: int) -> int:
    """`count` up to the next power of two: a key of tuning that takes few values."""
    return 1 << max(count - 1, 0).bit_length()
