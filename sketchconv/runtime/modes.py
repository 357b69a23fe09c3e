"""What torch is doing around a call: tracing, transforming, autocasting, or nothing of that."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

_transforms = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_autocast = torch.is_autocast_enabled
_autocast_anywhere = torch._C._is_any_autocast_enabled  # half the time of asking for one device


def ordinary(x: Tensor) -> bool:
    """Whether `x` is just data in CPU memory: kernels may be called on its address at once."""
    return (
        not is_compiling()
        and type(x) is Tensor
        and x.is_cpu
        and not _dispatch_modes()
        and not _transforms()
        and forward_ad._current_level < 0
        and not (_autocast_anywhere() and _autocast("cpu"))
    )


def traced(x: Tensor) -> bool:
    """Whether somebody records or imitates operations, and so has to see one of ours."""
    if is_compiling():
        return True
    return x.is_meta or bool(_dispatch_modes()) or _foreign(x)


def transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is under way."""
    return bool(_transforms()) or forward_ad._current_level >= 0


def autocasted(x: Tensor) -> Tensor:
    """`x` in the dtype in which `nn.Linear` would compute under the autocast that is on."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not _autocast(kind):
        return x
    if x.dtype is torch.float64 or not x.is_floating_point():
        return x
    return x.to(torch.get_autocast_dtype(kind))


def exact(kind: str) -> AbstractContextManager[object]:
    """A context without autocast on devices of this kind: kernels choose their dtypes."""
    if torch.amp.is_autocast_available(kind) and _autocast(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def _foreign(x: Tensor) -> bool:
    return type(x) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer)
