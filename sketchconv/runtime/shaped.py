"""`ShapedLinear`: a linear module whose LUTs are a fixed codebook times a scale per group."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sketchconv.formats.grids import GRIDS
from sketchconv.kernels.packed import Packed
from sketchconv.kernels.planes import packed_size
from sketchconv.runtime import mixed, modes, products
from sketchconv.runtime.devices import DISK
from sketchconv.runtime.functions import KERNEL_DTYPES
from sketchconv.runtime.modules import SketchLinear, _same_device, mixture
from sketchconv.runtime.products import ShapedMatmul


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
        if not x.is_floating_point() or x.shape[-1] != self.columns:
            raise ValueError(
                f"x must be float [..., {self.columns}], got {x.dtype} {tuple(x.shape)}"
            )
        _same_device("x", x, self)
        x = modes.autocasted(x)
        if self.tables().parked and (names := mixture()) is not None:
            y = mixed.by_task(self, self._of_task, x, names)
        else:
            y = self._product(x, self._tensors()[1])
        bias = self._parameters["bias"]
        return y if bias is None else y + bias.to(y.dtype)

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
