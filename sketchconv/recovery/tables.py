"""The LUTs of a model as one float32 vector: trained, rounded, put back in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sketchconv.kernels import plain
from sketchconv.kernels.planes import pack_rows
from sketchconv.runtime.modules import SketchLinear

TINY = 1e-15


class Tables:
    """Float32 masters of the LUTs of `modules`, all in one vector, with the state of Adam.

    While `open`, each module's `sketch_lut` is a trainable float32 view of the vector; `close`
    gives every module a LUT of its former dtype again: what it had, or the vector's values rounded,
    each LUT ascending and its indices renumbered to fit.

    The step of Adam is counted in units of the mean absolute entry of a LUT at the start, so that
    one learning rate fits weights of every size (Adam's step does not depend on the size of the
    gradient).
    """

    def __init__(self, modules: Sequence[SketchLinear], rate: Callable[[int], float]) -> None:
        self.modules = list(modules)
        self._former = [module._parameters["sketch_lut"] for module in self.modules]
        held = [self._held(lut) for lut in self._former]
        self.values = torch.cat([lut.reshape(-1) for lut in held])
        units = [lut.abs().mean(-1, keepdim=True).expand_as(lut).reshape(-1) for lut in held]
        steps = [unit * rate(m.bits) for unit, m in zip(units, self.modules, strict=True)]
        self._unit_step = torch.cat(steps)
        self._mean = torch.zeros_like(self.values)
        self._square = torch.zeros_like(self.values)
        self._count = 0

    @staticmethod
    def _held(lut: nn.Parameter | None) -> Tensor:
        if lut is None:
            raise RuntimeError("the sketch's tensors were removed from the module")
        return lut.detach().float()

    def open(self) -> None:
        """Give each module a trainable view of the vector."""
        begin = 0
        for module in self.modules:
            shape = module.sketch_lut.shape
            end = begin + shape.numel()
            module.sketch_lut = nn.Parameter(self.values[begin:end].view(shape))
            begin = end

    def close(self, keep: bool) -> None:
        """Give each module its former LUT back; with `keep` the trained values, in order."""
        for module, former in zip(self.modules, self._former, strict=True):
            trained = module.sketch_lut.detach()
            if former is None:
                continue
            module.sketch_lut = former
            if keep:
                former.data = trained.to(former.dtype)
                sort_tables(module)

    def step(self, share: float, betas: tuple[float, float]) -> bool:
        """One step of Adam with `share` of the learning rate, from the gradients of the modules.

        Gradients are dropped. Nothing is changed, and False returned, where one is not finite.

        Source: Kingma and Ba, Adam (2015), algorithm 1.
        """
        grad = torch.cat([self._gradient(module) for module in self.modules])
        for module in self.modules:
            module.sketch_lut.grad = None
        if not bool(torch.isfinite(grad).all()):
            return False
        self._count += 1
        first, second = betas
        self._mean.lerp_(grad, 1 - first)
        self._square.mul_(second).addcmul_(grad, grad, value=1 - second)
        mean = self._mean / (1 - first**self._count)
        root = (self._square / (1 - second**self._count)).sqrt_().add_(TINY)
        with torch.no_grad():
            self.values.addcdiv_(mean.mul_(self._unit_step), root, value=-share)
        return True

    @staticmethod
    def _gradient(module: SketchLinear) -> Tensor:
        grad = module.sketch_lut.grad
        return torch.zeros_like(module.sketch_lut).view(-1) if grad is None else grad.reshape(-1)

    def rounded(self) -> Tensor:
        """The vector with every LUT rounded to the dtype in which it will be stored."""
        parts, begin = [], 0
        for module, former in zip(self.modules, self._former, strict=True):
            end = begin + module.sketch_lut.numel()
            part = self.values[begin:end]
            parts.append(part if former is None else part.to(former.dtype).float())
            begin = end
        return torch.cat(parts)

    @contextmanager
    def shown(self, values: Tensor) -> Iterator[None]:
        """Have the modules use `values` for as long as the context lasts."""
        masters = self.values.clone()
        self.values.copy_(values)
        try:
            yield
        finally:
            self.values.copy_(masters)


def sort_tables(module: SketchLinear) -> int:
    """Put every LUT of `module` into ascending order, and its indices with it.

    The decoded weight stays the same, bit for bit. Ties keep their order.

    Returns:
        How many LUTs were out of order.
    """
    with torch.no_grad():
        lut = module.sketch_lut
        wide = lut.float()
        wrong = (wide[..., 1:] < wide[..., :-1]).any(-1)
        rows = wrong.any(-1).nonzero().view(-1)
        if not rows.numel():
            return 0
        _sort_rows(module, rows)
    return int(wrong.sum())


def _sort_rows(module: SketchLinear, rows: Tensor) -> None:
    lut, index = module.sketch_lut, module.disk_index()
    ordered, order = lut[rows].float().sort(dim=-1, stable=True)
    width = module.columns // module.groups
    codes = plain.unpack(index[rows], module.bits, width).long()
    codes = order.argsort(-1).gather(2, codes)
    flat = codes.to(torch.uint8).reshape(rows.numel(), module.columns)
    packed = pack_rows(flat.cpu().numpy(), module.bits, module.groups)
    table, changed = lut.detach().clone(), index.clone()
    table[rows] = ordered.to(lut.dtype)  # exact: the values came from there
    changed[rows] = torch.from_numpy(packed).to(index.device)
    lut.data = table
    module.sketch_index = changed
    module.settle()
