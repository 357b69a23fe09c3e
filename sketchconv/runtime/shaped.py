"""`ShapedLinear`: a linear module whose LUTs are a fixed codebook times a scale per group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sketchconv.formats.grids import COLUMNS, GRIDS
from sketchconv.kernels.ggml.packed import PackedShaped, multiply
from sketchconv.kernels.packed import Packed
from sketchconv.kernels.planes import packed_size
from sketchconv.runtime import mixed, modes, products
from sketchconv.runtime.devices import DISK
from sketchconv.runtime.functions import KERNEL_DTYPES
from sketchconv.runtime.modules import SketchLinear, mixture
from sketchconv.runtime.products import FUSED_TOKENS, ShapedMatmul


class ShapedLinear(SketchLinear):
    """`y = x @ W.T + bias` with a shaped sketch of `W`: `spec/sktch.md`, version 1.1.

    State: the buffer `sketch_index`, uint8 ``[rows, groups, bytes]``, and the parameter
    `sketch_scale`, float16 ``[rows, groups, fields]``, scales and behind them minima. No LUT is
    ever made: tiles of rows are decoded and multiplied in float32. As for a LUT, casts of the
    module leave the scales alone. Gradients flow to the input, the scales and minima, and the bias.

    Args:
        grid: name of the shape, a key of `formats.grids.GRIDS`.
        others: as for `SketchLinear`.
    """

    sketch_scale: nn.Parameter
    TABLE = "sketch_scale"
    grid: str
    _checked: tuple[Tensor, Tensor, PackedShaped] | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        grid: str,
        groups: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if grid not in GRIDS or bits not in GRIDS[grid].bits:
            raise ValueError(f"there is no grid {grid!r} of {bits} bits")
        if groups < 1 or in_features % (groups * COLUMNS):
            raise ValueError(
                f"groups of a shaped sketch have a multiple of {COLUMNS} columns, got {groups} "
                f"groups in {in_features} columns"
            )
        self.__dict__["grid"] = grid  # before the state is made
        super().__init__(
            in_features, out_features, bits, groups, bias=bias, device=device, dtype=dtype
        )

    def _make_state(self, lut_dtype: torch.dtype, device: torch.device | str | None) -> None:
        size = packed_size(self.columns // self.groups, self.bits)
        shape = (self.rows, self.groups)
        index = torch.zeros((*shape, size), dtype=torch.uint8, device=device)
        scale = torch.zeros((*shape, GRIDS[self.grid].fields), dtype=torch.float16, device=device)
        self.register_buffer("sketch_index", index)
        self.sketch_scale = nn.Parameter(scale)

    def packed(self) -> Packed | None:
        """None: the kernels of free LUTs have nothing to read here."""
        return None

    def shaped(self) -> PackedShaped | None:
        """The checked form that the CPU kernels take; None off the CPU and for other scales."""
        index, scale = self._tensors()
        known = self._checked
        # Tensors are assigned, and their data swapped, by many a loader.
        if (
            known is not None
            and known[0] is index
            and known[1] is scale
            and scale.dtype is torch.float16
            and known[2].index_pointer == index.data_ptr()
            and known[2].scale_pointer == scale.data_ptr()
        ):
            return known[2]
        self._checked = None
        if not (index.is_cpu and scale.is_cpu and scale.dtype is torch.float16):
            return None
        form = (self.columns, self.grid, self.bits)
        made = PackedShaped.of(index.contiguous(), scale.contiguous(), *form)
        self._checked = (index, scale, made)
        return made

    def _forget(self) -> None:
        super()._forget()
        self._checked = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_checked": None}

    def arrange(self) -> str:
        """The order of the index is always that of the disk."""
        return DISK

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight ``[rows, columns]``; float32 holds it exactly."""
        index, scale = self._tensors()
        with torch.no_grad():
            return products.dense(index, scale, self.grid, self.bits).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``[..., in_features]`` with the transposed weight and add the bias.

        Raises:
            RuntimeError: `x` and the sketch are on different devices.
            ValueError: `x` has another width, or no float dtype.
        """
        packed = self._few(x)
        y = self._general(x) if packed is None else multiply(packed, x)
        bias = self._parameters["bias"]
        return y if bias is None else y + bias.to(y.dtype)

    def _few(self, x: Tensor) -> PackedShaped | None:
        """What to multiply at once with `x`: few tokens in CPU memory, and no gradients."""
        if not modes.ordinary(x) or x.dtype not in KERNEL_DTYPES:
            return None
        if x.shape[-1] != self.columns or x.numel() > FUSED_TOKENS * self.columns:
            return None
        if self.tables().parked and mixture() is not None:
            return None
        if torch.is_grad_enabled() and (x.requires_grad or self._tensors()[1].requires_grad):
            return None
        return self.shaped()

    def _general(self, x: Tensor) -> Tensor:
        """As `forward` without the bias, wherever more is going on than few tokens."""
        self._check(x)
        x = modes.autocasted(x)
        if self.tables().parked and (names := mixture()) is not None:
            return mixed.by_task(self, self._of_task, x, names)
        return self._product(x, self._tensors()[1])

    def _of_task(self, x: Tensor, key: str) -> Tensor:
        return self._product(x, self.lut_of(key))

    def _product(self, x: Tensor, scale: Tensor) -> Tensor:
        args = (self._tensors()[0], scale, self.grid, self.bits)
        if modes.ordinary(x) and x.dtype in KERNEL_DTYPES:
            y: Tensor = ShapedMatmul.apply(x, *args)  # type: ignore[no-untyped-call]
            return y
        return products.multiply_plain(x, *args)

    def _shape(self) -> str:
        return f"{super()._shape()}, grid={self.grid}"
