"""Products and look-ups of batches whose samples use the LUTs of different adapters.

The indices are those of the one base. On the CPU they are read once per tile of rows for all tasks
(`kernels.tasks`); with gradients, and where no kernel runs, the batch is split by task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sketchconv.adapters.batch import Names, spread
from sketchconv.kernels import plain, tasks
from sketchconv.runtime import functions, modes
from sketchconv.runtime.devices import gpu_kernels
from sketchconv.runtime.functions import KERNEL_DTYPES, SketchGather, SketchMatmul

if TYPE_CHECKING:
    from sketchconv.runtime.sketch import SketchModule

Single = Callable[[Tensor, str], Tensor]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a mixed batch of one kind needs of one module; kept for the next batch of the kind.

    Attributes:
        names: the adapter of each sample.
        each: tokens of a sample.
        tensors: index and LUT that are in place, and their addresses.
        mixture: the kernels' part.
    """

    names: Names
    each: int
    tensors: tuple[Tensor, Tensor]
    places: tuple[int, int]
    mixture: tasks.Mixture

    def fits(self, module: SketchModule, names: Names, each: int) -> bool:
        """Whether it is that of such a batch, with the module's tensors as they are now."""
        index, lut = module._tensors()
        return (
            self.names == names
            and self.each == each
            and self.tensors[0] is index
            and self.tensors[1] is lut
            and self.places == (index.data_ptr(), lut.data_ptr())
        )


def linear(module: SketchModule, x: Tensor, names: Names) -> Tensor:
    """`x @ W.T` for samples of several adapters: ``[n, ..., columns]`` to ``[n, ..., rows]``."""
    x = modes.autocasted(spread(x, names))
    grad = torch.is_grad_enabled()
    if not grad and modes.ordinary(x) and x.dtype in KERNEL_DTYPES:
        flat = x.reshape(-1, x.shape[-1])
        each = flat.shape[0] // len(names)
        plan = module.tables().plan
        if plan is None or not plan.fits(module, names, each):
            plan = _planned(module, names, each)
        if plan is not None:
            y: Tensor = plan.mixture.multiply(flat)
            return y.view(*x.shape[:-1], module.rows)
    keys = [module.tables().key(name) for name in names]
    order = list(dict.fromkeys(keys))
    which = [order.index(key) for key in keys]
    if len(order) > 1 and x.numel() and not modes.transformed():
        luts = [module.lut_of(key) for key in order]
        if not (grad and (x.requires_grad or any(lut.requires_grad for lut in luts))):
            y_gpu = _on_gpu(module, x, luts, which)
            if y_gpu is not None:
                return y_gpu
    return _split(partial(_product, module), x, order, which)


def _planned(module: SketchModule, names: Names, each: int) -> Plan | None:
    """A new plan, None off the CPU."""
    keys = [module.tables().key(name) for name in names]
    order = list(dict.fromkeys(keys))
    found = [module.packed_of(key) for key in order]
    matrices = [packed for packed in found if packed is not None]
    if len(matrices) < len(found) or not each:
        return None
    index, lut = module._tensors()
    mixture = tasks.Mixture.of(matrices, [order.index(k) for k in keys for _ in range(each)])
    places = (index.data_ptr(), lut.data_ptr())
    plan = Plan(names, each, (index, lut), places, mixture)
    module.tables().plan = plan
    return plan


def embedding(
    module: SketchModule, ids: Tensor, names: Names, dtype: torch.dtype, padding: int | None
) -> Tensor:
    """Rows `ids` for samples of several adapters: ``[n, ...]`` to ``[n, ..., columns]``."""
    return by_task(module, partial(_rows, module, dtype, padding), ids, names)


def by_task(module: SketchModule, run: Single, x: Tensor, names: Names) -> Tensor:
    """``run(part, key)`` for the samples of each LUT of `module`, in the order of the samples."""
    x = spread(x, names)
    keys = [module.tables().key(name) for name in names]
    order = list(dict.fromkeys(keys))
    return _split(run, x, order, [order.index(key) for key in keys])


def _on_gpu(
    module: SketchModule, x: Tensor, luts: Sequence[Tensor], which: Sequence[int]
) -> Tensor | None:
    gpu = gpu_kernels(x)
    if gpu is None or x.dtype not in KERNEL_DTYPES:
        return None
    _, index, _, layout = module.operands()
    flat = x.reshape(-1, x.shape[-1])
    each = flat.shape[0] // len(which)
    task = torch.tensor(which, device=x.device).repeat_interleave(each)
    with modes.exact(x.device.type):
        y: Tensor = gpu.multiply_tasks(flat, index, torch.stack(list(luts)), task, layout=layout)
    return y.view(*x.shape[:-1], module.rows)


def _split(run: Single, x: Tensor, order: Sequence[str], which: Sequence[int]) -> Tensor:
    """Each task's samples on their own, put together again in the order of the samples."""
    if len(order) == 1:
        return run(x, order[0])
    samples = x.reshape(len(which), -1, *x.shape[1:])
    parts, places = [], []
    for task, key in enumerate(order):
        own = [number for number, mine in enumerate(which) if mine == task]
        places += own
        parts.append(run(samples[own], key))
    back = sorted(range(len(places)), key=places.__getitem__)
    together = torch.cat(parts)[back]
    return together.reshape(x.shape[0], *together.shape[2:])


def _product(module: SketchModule, x: Tensor, key: str) -> Tensor:
    lut = module.lut_of(key)
    if modes.transformed():
        return plain.multiply(x, module.disk_index(), lut)
    packed = module.packed_of(key)
    _, index, _, layout = module.operands()
    if torch.is_grad_enabled() and (x.requires_grad or lut.requires_grad):
        y: Tensor = SketchMatmul.apply(x, index, lut, packed, layout)  # type: ignore[no-untyped-call]
        return y
    return functions.multiply(x, index, lut, packed, layout)


def _rows(
    module: SketchModule, dtype: torch.dtype, padding: int | None, ids: Tensor, key: str
) -> Tensor:
    lut, packed = module.lut_of(key), module.packed_of(key)
    _, index, _, layout = module.operands()
    args = (module.columns, dtype)
    if torch.is_grad_enabled() and lut.requires_grad:
        return SketchGather.apply(lut, ids, index, *args, padding, packed, layout)  # type: ignore[no-untyped-call, no-any-return]
    return functions.gather(ids, index, lut, *args, packed, layout)
