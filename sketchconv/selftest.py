"""The CPU kernels that can run here, on small planted data, against the NumPy reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    from sketchconv.kernels.packed import Packed

# rows, groups, columns: below one vector, tails of every plane, odd groups, several blocks.
SHAPES = ((5, 1, 7), (6, 3, 45), (3, 1, 1300), (7, 5, 640))
TOKENS = (1, 5, 12)  # 12 are so many that they meet decoded tiles
OTHER_LUTS_AT = 4  # bits at which LUTs other than float16 are tried too: each takes compiling


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison with the reference."""

    kernel: str
    what: str
    passed: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """All comparisons of one set of kernels; `not_run` says why there are none."""

    kernel: str
    checks: tuple[Check, ...]
    not_run: str | None = None

    @property
    def passed(self) -> int:
        """Comparisons that held."""
        return sum(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[str, ...]:
        """What did not hold."""
        return tuple(check.what for check in self.checks if not check.passed)


def self_test(bits: tuple[int, ...] = tuple(range(1, 9))) -> Iterator[Outcome]:
    """Run all comparisons; yields one outcome per set of kernels, the fastest first.

    Decoded weights must be those of the reference bit for bit (bfloat16: rounded to nearest);
    products may differ by the rounding of their sums. Kernels that were never used on this machine
    are compiled, which takes up to a minute or two.
    """
    from sketchconv.doctor import find_kernels

    for candidate in find_kernels():
        if candidate.state == "rejected":
            yield Outcome(candidate.name, (), candidate.reason)
        else:
            yield Outcome(candidate.name, tuple(_checks(candidate.name, bits)))


def _checks(kernel: str, bits: tuple[int, ...]) -> Iterator[Check]:
    for width in bits:
        for lut in ("F16", "BF16", "F32") if width == OTHER_LUTS_AT else ("F16",):
            for shape in SHAPES:
                matrix = _planted(width, lut, *shape)
                title = f"{width} bits, {lut} LUT, {'x'.join(map(str, shape))}"
                for order, arranged in _orders(kernel, matrix):
                    for what, passed in _compare(kernel, matrix, arranged):
                        yield Check(kernel, f"{title}{order}: {what}", passed)


def _orders(kernel: str, matrix: Packed) -> Iterator[tuple[str, Packed]]:
    """The matrix in every order that the kernels read, each with words for it."""
    from sketchconv.kernels import dispatch, woven
    from sketchconv.kernels.orders import WOVEN
    from sketchconv.kernels.packed import Packed

    yield "", matrix
    width = matrix.group_columns
    if WOVEN in dispatch.choose(kernel).orders and woven.differs(matrix.bits, width):
        index = woven.weave(matrix.index, matrix.bits, width)
        yield ", woven", Packed.of(index, matrix.lut, matrix.columns, WOVEN)


def _planted(bits: int, lut: str, rows: int, groups: int, columns: int) -> Packed:
    """A matrix with hard rows: zeros, a constant, an outlier; then noise."""
    import torch

    from sketchconv.kernels.packed import LUT_DTYPES, Packed
    from sketchconv.kernels.planes import pack_rows

    rng = np.random.default_rng([bits, rows, groups, columns])
    codes = rng.integers(0, 2**bits, (rows, columns)).astype(np.uint8)
    codes[1] = 2**bits - 1
    table = rng.standard_normal((rows, groups, 2**bits)).astype(np.float32)
    table[0] = 0
    table[1, :, -1] = 0.75
    table[2, 0, 0] = 3e4
    dtype = {name: dtype for dtype, name in LUT_DTYPES.items()}[lut]
    index = torch.from_numpy(pack_rows(codes, bits, groups))
    return Packed.of(index, torch.from_numpy(table).to(dtype), columns)


def _compare(kernel: str, matrix: Packed, arranged: Packed) -> Iterator[tuple[str, bool]]:
    """Results of `arranged` against the reference on `matrix`, in the order of the disk."""
    import torch

    from sketchconv.kernels import dequantize, gemv, reference_linear

    lut = matrix.lut
    carrier = lut.view(torch.uint16) if lut.dtype is torch.bfloat16 else lut
    weight = reference_linear.dequantize(matrix.index.numpy(), carrier.numpy(), matrix.columns)
    exact = torch.from_numpy(weight)
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        decoded = dequantize.decode(arranged, dtype, kernel=kernel)
        yield f"rows in {name}", torch.equal(decoded, exact.to(dtype))
        for tokens in TOKENS:
            x = _activations(tokens, matrix.columns).to(dtype)
            error = _error(gemv.multiply(arranged, x, kernel), x, weight)
            limit = _limit(x, weight, tokens > gemv.FEW_TOKENS)
            yield f"{tokens} tokens in {name}", bool((error <= limit).all())


def _activations(tokens: int, columns: int) -> torch.Tensor:
    import torch

    values = np.random.default_rng(tokens).standard_normal((tokens, columns))
    return torch.from_numpy(values.astype(np.float32))


def _error(y: torch.Tensor, x: torch.Tensor, weight: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    exact: npt.NDArray[np.float64] = x.double().numpy() @ weight.T.astype(np.float64)
    return np.abs(y.double().numpy() - exact)


def _limit(x: torch.Tensor, weight: npt.NDArray[Any], tiles: bool) -> npt.NDArray[np.float64]:
    """Rounding of float32 sums; for bfloat16 also of the result, and of weights in tiles.

    Rounding to nearest errs by at most 2**-24 of a float32 and 2**-8 of a bfloat16.
    """
    import torch

    spread: npt.NDArray[np.float64] = np.abs(x.double().numpy()) @ np.abs(
        weight.T.astype(np.float64)
    )
    limit = (weight.shape[1] + 2) * 2.0**-24 * spread
    if x.dtype is torch.bfloat16:
        exact = np.abs(x.double().numpy() @ weight.T.astype(np.float64))
        if tiles:
            limit = limit * (1 + 2.0**-8) + 2.0**-8 * spread
        limit = limit + 2.0**-8 * (exact + limit)
    result: npt.NDArray[np.float64] = limit + 1e-30
    return result
