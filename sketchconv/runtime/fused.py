"""Siblings that multiply the same input, such as q, k and v: one call of the kernels for all.

The first of them that is called computes the products of all and leaves those of the others beside
the input; each sibling then finds its own. A product is taken only by the thread that made it, for
the very same tensor, unchanged, with unchanged weights, and once. What nobody takes goes with the
input. Where siblings turn out to get different inputs (cross-attention) they part after
`MOST_MISSES` times.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from sketchconv.kernels import gemv
from sketchconv.kernels.packed import Packed

if TYPE_CHECKING:
    from sketchconv.runtime.modules import SketchLinear

NAMES = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
    ("q", "k", "v"),
)
MOST_MISSES = 2


class _Stash:
    """Products of one input that siblings have not taken yet."""

    __slots__ = ("input", "packed", "pointer", "products", "version", "weights")

    def __init__(self, x: Tensor, packed: tuple[Packed, ...], weights: list[int]) -> None:
        self.products: list[Tensor | None] = list(gemv.multiply_group(packed, x))
        self.packed, self.weights = packed, weights
        self.pointer, self.version = x.data_ptr(), x._version
        self.input = weakref.ref(x, self._drop)

    def _drop(self, _: object) -> None:
        self.products = []

    def fits(self, x: Tensor) -> bool:
        """Whether `x` is the input of these products, and holds what it held."""
        return self.input() is x and self.version == x._version and self.pointer == x.data_ptr()


class Siblings:
    """The group itself: weak references to its modules, and a stash for each thread."""

    def __init__(self, modules: tuple[SketchLinear, ...]) -> None:
        self._modules = tuple(weakref.ref(module) for module in modules)
        self._local = threading.local()
        self._misses = 0

    def modules(self) -> tuple[SketchLinear, ...] | None:
        """The modules; None where one of them is gone."""
        found = tuple(reference() for reference in self._modules)
        return None if None in found else found  # type: ignore[return-value]

    def part(self) -> None:
        """Let every module compute alone from now on."""
        for reference in self._modules:
            module = reference()
            if module is not None and module.fused is not None and module.fused.siblings is self:
                module.fused = None

    def take(self, number: int, packed: Packed, x: Tensor) -> Tensor | None:
        """The product of module `number` with `x`; None where it has to compute alone."""
        stash: _Stash | None = getattr(self._local, "stash", None)
        if stash is None or not stash.fits(x):
            if stash is not None and self._missed():
                return None
            return self._lead(number, x)
        found = stash.products[number]
        if found is None or stash.packed[number] is not packed:
            return None
        if stash.weights[number] != _version(packed):
            return None
        stash.products[number] = None
        if not any(product is not None for product in stash.products):
            self._local.stash = None
            self._misses = 0
        return found

    def _missed(self) -> bool:
        """Count products that nobody took; True when it is time to part."""
        self._local.stash = None
        self._misses += 1
        if self._misses >= MOST_MISSES:
            self.part()
            return True
        return False

    def _lead(self, number: int, x: Tensor) -> Tensor | None:
        modules = self.modules()
        if modules is None:
            self.part()
            return None
        packed = tuple(module.packed() for module in modules)
        if None in packed:
            return None
        self._local.stash = stash = _Stash(x, packed, [_version(each) for each in packed])  # type: ignore[arg-type]
        found, stash.products[number] = stash.products[number], None
        return found


@dataclass(frozen=True, slots=True)
class Place:
    """A module's place among its siblings."""

    siblings: Siblings
    number: int

    def take(self, packed: Packed, x: Tensor) -> Tensor | None:
        """The module's product with `x`, where the siblings compute together; else None.

        They do for few tokens; for many, the matrix products leave nothing to gain. Tensors made in
        inference mode do not tell when they change.
        """
        if x.numel() > gemv.FEW_TOKENS * packed.columns or x.is_inference():
            return None
        return self.siblings.take(self.number, packed, x)


def _version(packed: Packed) -> int:
    """Grows whenever the sketch is changed in place; checked views share it with their tensors."""
    return packed.index._version + packed.lut._version


def fuse(model: nn.Module) -> int:
    """Let siblings of `model` with equal bits, groups, columns and LUT dtype compute together.

    Siblings are `SketchLinear` modules of one parent, found by their names (`NAMES`). Results stay
    the same. Copies of the model are not fused. `unfuse` undoes it.

    Returns:
        How many groups were made.
    """
    count = 0
    for parent in model.modules():
        for names in NAMES:
            for alike in _alike(parent, names):
                siblings = Siblings(alike)
                for number, module in enumerate(alike):
                    module.fused = Place(siblings, number)
                count += 1
    return count


def unfuse(model: nn.Module) -> None:
    """Let every module of `model` compute alone."""
    from sketchconv.runtime.modules import SketchLinear

    for module in model.modules():
        if isinstance(module, SketchLinear):
            module.fused = None


def _alike(parent: nn.Module, names: tuple[str, ...]) -> list[tuple[SketchLinear, ...]]:
    from sketchconv.runtime.modules import SketchLinear

    kinds: dict[object, list[SketchLinear]] = defaultdict(list)
    for name in names:
        module = parent._modules.get(name)
        if type(module) is SketchLinear:
            lut = module.sketch_lut
            kinds[module.bits, module.groups, module.columns, lut.dtype, lut.device].append(module)
    return [tuple(modules) for modules in kinds.values() if len(modules) > 1]
