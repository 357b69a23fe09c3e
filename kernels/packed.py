"""A sketched matrix as it lies in memory, checked once and ready for the CPU kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sketchconv.kernels.orders import PLANES, WOVEN
from sketchconv.kernels.planes import packed_size
from sketchconv.kernels.woven import differs

LUT_DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """Checked views of one sketched matrix `[rows, columns]` in CPU memory.

    Make it with `Packed.of`. `index` is uint8 ``[rows, groups, bytes]``, `lut` float16, bfloat16 or
    float32 ``[rows, groups, 2**bits]``, both contiguous. `order` is that of the index: the packing
    `planes-le` of the disk, or `woven`.
    """

    index: Tensor
    lut: Tensor
    rows: int
    groups: int
    columns: int
    bits: int
    lut_dtype: str
    order: str
    # Computed once: reading them from the tensors took 1.5 of the 5 us around a small product.
    group_columns: int
    weights: int
    index_pointer: int
    lut_pointer: int

    @staticmethod
    def of(index: Tensor, lut: Tensor, columns: int, order: str = PLANES) -> Packed:
        """Check that `index` and `lut` fit together and describe rows of `columns` columns.

        Raises:
            ValueError: device, dtype, layout, order or shape is not what the kernels read.
        """
        if order not in (PLANES, WOVEN):
            raise ValueError(f"the order is {order!r}, must be {PLANES!r} or {WOVEN!r}")
        index, lut = index.detach(), lut.detach()
        bits = check_shapes(index.shape, lut.shape, columns)
        if index.dtype != torch.uint8 or lut.dtype not in LUT_DTYPES:
            raise ValueError(
                f"index must be uint8 and lut float16, bfloat16 or float32, got {index.dtype} and "
                f"{lut.dtype}"
            )
        for name, tensor in (("index", index), ("lut", lut)):
            if tensor.device.type != "cpu" or not tensor.is_contiguous():
                raise ValueError(
                    f"{name} must be contiguous in CPU memory, got strides {tensor.stride()} on "
                    f"{tensor.device}"
                )
        rows, groups = lut.shape[:2]
        if not rows:
            raise ValueError("a sketched matrix has at least one row")
        return Packed(
            index,
            lut,
            rows,
            groups,
            columns,
            bits,
            LUT_DTYPES[lut.dtype],
            order if differs(bits, columns // groups) else PLANES,
            group_columns=columns // groups,
            weights=rows * columns,
            index_pointer=index.data_ptr(),
            lut_pointer=lut.data_ptr(),
        )


def check_shapes(index: tuple[int, ...], lut: tuple[int, ...], columns: int) -> int:
    """Bits of a sketch with these shapes.

    Raises:
        ValueError: the shapes do not describe a matrix of `columns` columns.
    """
    if len(index) != 3 or len(lut) != 3 or index[:2] != lut[:2]:
        raise ValueError(f"index {tuple(index)} and lut {tuple(lut)} do not fit together")
    bits = lut[2].bit_length() - 1
    if not 1 <= bits <= 8 or lut[2] != 2**bits:
        raise ValueError(f"a LUT has 2 to 256 entries, a power of two, got {lut[2]}")
    if lut[1] < 1 or columns < 1 or columns % lut[1]:
        raise ValueError(f"{lut[1]} groups do not divide {columns} columns")
    size = packed_size(columns // lut[1], bits)
    if index[2] != size:
        raise ValueError(
            f"{columns // lut[1]} columns of {bits} bits take {size} bytes per group, "
            f"index has {index[2]}"
        )
    return bits
