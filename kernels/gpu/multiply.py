"""Products with a sketch on a GPU: which kernel takes which."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from sketchconv.kernels import plain
from sketchconv.kernels.gpu import fragments, gemv, matmul, permute, support, tiles
from sketchconv.kernels.gpu.layout import restore
from sketchconv.kernels.packed import check_shapes

FEW = 8  # tokens
MANY = 256  # from here on tiles of the weight and a BLAS are faster than decoding on the way
TILE_ROWS = 2048


def multiply(x: Tensor, index: Tensor, lut: Tensor, layout: str = "planes-le") -> Tensor:
    """`x @ W.T`, summed in float32 (float64 for float64 input).

    On NVIDIA, many tokens go to the vendor's BLAS with decoded tiles: its settings in torch hold.
    Where `support.why_dense` gives a reason, tiles of rows are decoded and go to the vendor's BLAS.

    Args:
        x: ``[..., columns]``.
        index: uint8 ``[rows, groups, bytes]``, on the device of `x`.
        lut: ``[rows, groups, 2**bits]``; tables wider than `x` may be rounded to its dtype.
        layout: order of `index`, "planes-le" or "device".

    Returns:
        ``[..., rows]`` of the dtype of `x`.

    Raises:
        ValueError: shapes that do not belong together, or a layout of another name.
    """
    _check(x, index, lut, layout)
    rows, columns = lut.shape[0], x.shape[-1]
    flat = x.reshape(-1, columns)
    if flat.stride(1) != 1 or flat.stride(0) < columns:
        flat = flat.contiguous()
    y = x.new_empty(flat.shape[0], rows)
    if not y.numel():
        pass
    elif support.why_dense(x.device, x.dtype, lut.dtype) is not None:
        _dense(flat, index, lut, y, layout)
    elif support.nvidia(x.device):
        _nvidia(flat, index, lut, y, layout)
    elif flat.shape[0] <= FEW:
        gemv.run(flat, index.contiguous(), lut.contiguous(), y, layout)
    else:
        matmul.run(flat, index.contiguous(), lut.contiguous(), y, layout)
    return y.reshape(*x.shape[:-1], rows)


def _nvidia(x: Tensor, index: Tensor, lut: Tensor, y: Tensor, layout: str) -> None:
    """The fastest on an H100 for each number of tokens."""
    tokens, three = x.shape[0], lut.shape[-1] == 8
    if tokens <= (FEW if three else 2 * FEW) and fragments.fits(x, index, lut, layout):
        fragments.run(x, index, lut, y)
    elif tokens < MANY and permute.fits(x, index, lut, layout):
        permute.run(x, index, lut, y)
    elif tokens <= FEW // 2:
        gemv.run(x, index.contiguous(), lut.contiguous(), y, layout)
    else:
        tiles.multiply(x, index.contiguous(), lut.contiguous(), y, layout)


def _check(x: Tensor, index: Tensor, lut: Tensor, layout: str) -> None:
    if layout not in ("planes-le", "device"):
        raise ValueError(f"layout is {layout!r}, must be 'planes-le' or 'device'")
    check_shapes(index.shape, lut.shape, x.shape[-1])


def _dense(x: Tensor, index: Tensor, lut: Tensor, y: Tensor, layout: str) -> None:
    for begin in range(0, lut.shape[0], TILE_ROWS):
        tile = slice(begin, begin + TILE_ROWS)
        y[:, tile] = functional.linear(x, _decode(index[tile], lut[tile], x, layout))


def _decode(index: Tensor, lut: Tensor, x: Tensor, layout: str) -> Tensor:
    columns = x.shape[1]
    if lut.dtype in support.DTYPES and x.dtype in support.DTYPES:
        from sketchconv.kernels.gpu.decode import decode  # it imports half of the other kernels

        dense: Tensor = decode(index, lut, columns, x.dtype, layout)
        return dense
    if layout == "device":
        bits = lut.shape[-1].bit_length() - 1
        index = restore(index, bits, columns // lut.shape[1])
    return plain.decode(index, lut, columns, x.dtype)
