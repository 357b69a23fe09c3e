"""Products in the interpreter, against the exact product and the plain reference.

Tolerances: a sum of n products in float32, whatever its order, is within n * 2**-24 of the exact
sum times the sum of absolute products; the result is rounded once to the dtype of the input, and
where the reference rounds the table to that dtype, so do we.
"""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor

from sketchconv.kernels import plain
from sketchconv.kernels.gpu import fragments, ops, permute, support, tiles
from sketchconv.kernels.gpu.multiply import multiply

UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


def noise(tokens: int, columns: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(torch.get_default_device()).manual_seed(tokens * columns)
    return torch.randn(tokens, columns, generator=generator).to(dtype)


def close(found: Tensor, x: Tensor, weight: Tensor) -> None:
    """`weight` is float64 ``[rows, columns]``, as exact as the kernel is asked to see it."""
    exact = x.double() @ weight.T
    spread = x.double().abs() @ weight.abs().T
    slack = x.shape[1] * 2.0**-24 * spread + 2.0**-25  # the smallest float16 above zero, halved
    assert found.shape == exact.shape
    assert found.dtype is x.dtype
    bound = UNIT[x.dtype] * exact.abs() + (1 + UNIT[x.dtype]) * slack
    worst = ((found.double() - exact).abs() - bound).max()
    assert worst <= 0, worst


@pytest.mark.parametrize("tokens", [1, 3, 4])
@pytest.mark.parametrize(
    ("bits", "order"), [*((bits, "planes-le") for bits in range(1, 9)), (3, "device")]
)
def test_few_tokens_of_every_width(sketch, bits, order, tokens):
    # Spans of 4 to 32 columns: 64 of them cross groups, the last tile is not full.
    case = sketch(21, 192, bits, groups=2, seed=bits)
    x = noise(tokens, 192, torch.float32)
    close(multiply(x, case.on(order), case.lut, order), x, case.dense())


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize(("columns", "groups"), [(135, 3), (7, 7), (1, 1)])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_groups_that_are_no_whole_words(sketch, bits, columns, groups, tokens):
    case = sketch(5, columns, bits, groups, seed=columns)
    x = noise(tokens, columns, torch.float32)
    close(multiply(x, case.index, case.lut), x, case.dense())


@pytest.mark.parametrize("tokens", [2, 17])
@pytest.mark.parametrize("table", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_pair_of_types(sketch, dtype, table, tokens):
    case = sketch(19, 96, 4, groups=3, dtype=table, seed=7)
    x = noise(tokens, 96, dtype)
    weight = case.dense()
    permuted = support.nvidia(x.device) and fragments.fits(x, case.index, case.lut, "planes-le")
    if tokens > 8 or permuted:
        weight = case.dense(dtype).double()  # tiles are rounded to the input, as in the reference
    close(multiply(x, case.index, case.lut), x, weight)


@pytest.mark.parametrize(
    ("bits", "order"), [(2, "planes-le"), (3, "device"), (5, "planes-le"), (6, "planes-le")]
)
def test_many_tokens_with_tails_of_every_tile(sketch, bits, order):
    # 70 rows and tokens leave tails behind tiles of 64; groups of 224 columns straddle them.
    case = sketch(70, 448, bits, groups=2, dtype=torch.bfloat16, seed=bits)
    x = noise(70, 448, torch.bfloat16)
    close(multiply(x, case.on(order), case.lut, order), x, case.dense())


def test_leading_dimensions_strides_and_nothing_at_all(sketch):
    case = sketch(6, 64, 4)
    x = noise(6, 64, torch.float32).reshape(2, 3, 64)
    wanted = plain.multiply(x, case.index, case.lut)
    assert torch.allclose(multiply(x, case.index, case.lut), wanted, rtol=1e-5, atol=1e-3)
    wide = torch.zeros(6, 100)
    wide[:, :64] = x.reshape(6, 64)
    close(multiply(wide[:, :64], case.index, case.lut), x.reshape(6, 64), case.dense())
    spread = x.reshape(6, 64).mT.contiguous().mT
    close(multiply(spread, case.index, case.lut), x.reshape(6, 64), case.dense())
    assert multiply(x[:, :0], case.index, case.lut).shape == (2, 0, 6)


def test_a_column_that_is_not_finite_reaches_its_token_only(sketch):
    case = sketch(6, 45, 4)
    x = noise(3, 45, torch.float32)
    x[1, 44] = float("inf")
    found = multiply(x, case.index, case.lut)
    close(found[::2], x[::2], case.dense())
    assert not found[1].isfinite().all()


def test_float64_goes_through_the_decoded_weight(sketch):
    case = sketch(6, 96, 3, groups=3)
    x = noise(4, 96, torch.float64)
    assert "float64" in support.why_dense(x.device, x.dtype, case.lut.dtype)
    for order in ("planes-le", "device"):
        found = multiply(x, case.on(order), case.lut, order)
        assert torch.allclose(found, x @ case.dense().T, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("order", ["planes-le", "device"])
def test_a_gpu_without_tensor_cores_multiplies_a_decoded_weight(sketch, order, monkeypatch):
    monkeypatch.setattr(support, "why_dense", lambda *_: "compute capability 7.5")
    module = import_module("sketchconv.kernels.gpu.multiply")
    monkeypatch.setattr(module, "TILE_ROWS", 16)
    monkeypatch.setattr(module.matmul, "run", None)
    case = sketch(21, 96, 3, groups=3, dtype=torch.bfloat16)
    x = noise(9, 96, torch.float32)
    close(multiply(x, case.on(order), case.lut, order), x, case.dense())


def test_bad_arguments_are_named(sketch):
    case = sketch(6, 96, 4, groups=2)
    with pytest.raises(ValueError, match="layout is 'rows'"):
        multiply(torch.zeros(1, 96), case.index, case.lut, "rows")
    with pytest.raises(ValueError, match="do not divide 95 columns"):
        multiply(torch.zeros(1, 95), case.index, case.lut)
    with pytest.raises(ValueError, match="take 24 bytes per group, index has 23"):
        multiply(torch.zeros(1, 96), case.index[..., :-1], case.lut)


def test_ops_is_the_same_function():
    assert ops.multiply is multiply
    with pytest.raises(AttributeError, match="no attribute conjure"):
        ops.conjure  # noqa: B018


# The byte-permuting kernel. Where the compiler gets inline assembly (PRMT, LOP3, MOV), the
# interpreter runs the same steps in integers; `test_permute.py` checks PRMT's. The assembly itself
# never runs.


@pytest.mark.parametrize(
    ("tokens", "bits", "dtype", "taken"),
    [(1, 4, torch.float16, fragments), (16, 4, torch.float16, fragments),
     (8, 3, torch.bfloat16, fragments), (9, 3, torch.float16, permute),
     (17, 4, torch.float16, permute), (256, 4, torch.float16, tiles),
     (9, 5, torch.float16, tiles), (9, 4, torch.float32, tiles)],
)  # fmt: skip
def test_which_kernel_takes_what_on_nvidia(sketch, monkeypatch, tokens, bits, dtype, taken):
    ran = []
    monkeypatch.setattr(support, "nvidia", lambda device: True)
    for module in (fragments, permute, tiles):
        name = "multiply" if module is tiles else "run"
        monkeypatch.setattr(module, name, lambda *_, each=module: ran.append(each))
    case = sketch(4, 64, bits)
    multiply(noise(tokens, 64, dtype), case.on("device"), case.lut, "device")
    assert ran == [taken]


def test_a_product_of_several_parts(sketch):
    """Permuted bytes as on an NVIDIA GPU, 256 columns: two splits."""
    case = sketch(20, 256, 3, groups=2)
    x = noise(17, 256, torch.float16)
    found = torch.empty(17, 20, dtype=torch.float16)
    permute.run(x, case.on("device"), case.lut, found)
    close(found, x, case.dense())


@pytest.mark.parametrize(
    ("bits", "dtype", "tokens"),
    [(1, torch.float16, 1), (2, torch.bfloat16, 1), (3, torch.float16, 11), (3, torch.bfloat16, 1),
     (4, torch.float16, 1), (4, torch.bfloat16, 11)],
)  # fmt: skip
def test_permuted_bytes(sketch, bits, dtype, tokens):
    case = sketch(37, 320, bits, groups=2, dtype=dtype, seed=bits)
    x, index = noise(tokens, 320, dtype), case.on("device")
    assert permute.fits(x, index, case.lut, "device")
    found = torch.empty(tokens, 37, dtype=dtype)
    permute.run(x, index, case.lut, found)
    close(found, x, case.dense())


@pytest.mark.parametrize(("columns", "groups"), [(32, 1), (288, 3)])
def test_permuted_bytes_with_tails(sketch, columns, groups):
    case = sketch(37, columns, 4, groups, torch.float32, seed=columns)
    x = noise(9, columns, torch.float16)
    found = torch.empty(9, 37, dtype=torch.float16)
    permute.run(x, case.index, case.lut, found)
    close(found, x, case.dense(torch.float16).double())


@pytest.mark.parametrize(
    ("bits", "columns", "layout", "dtype"),
    [(5, 64, "device", torch.float16), (4, 12, "device", torch.float16),
     (3, 64, "planes-le", torch.float16), (3, 48, "device", torch.float16),
     (4, 64, "device", torch.float32), (4, 8, "device", torch.bfloat16)],
)  # fmt: skip
def test_sketches_that_cannot_be_permuted(sketch, bits, columns, layout, dtype):
    case = sketch(4, columns, bits)
    assert not permute.fits(torch.zeros(1, columns, dtype=dtype), case.index, case.lut, layout)


@pytest.mark.parametrize("bits", [3, 4])
def test_an_index_off_a_word_is_multiplied_all_the_same(sketch, bits):
    case = sketch(4, 64, bits)
    room = torch.empty(case.index.numel() + 1, dtype=torch.uint8)
    moved = room[1:].reshape(case.index.shape).copy_(case.on("device"))
    assert moved.data_ptr() % 4
    assert not permute.fits(torch.zeros(1, 64).half(), moved, case.lut, "device")
    x = noise(2, 64, torch.float32)
    close(multiply(x, moved, case.lut, "device"), x, case.dense())
