"""Dense rows are exact: entries of the LUT, rounded once."""

from __future__ import annotations

import pytest
import torch

from sketchconv.kernels.gpu import decode, layout

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.dtype is wanted.dtype
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(
    ("rows", "columns", "groups"), [(37, 90, 2), (9, 45, 1), (5, 300, 1), (6, 24, 24), (4, 576, 1)]
)
def test_every_width(sketch, bits, rows, columns, groups):
    case = sketch(rows, columns, bits, groups)
    same(decode.decode(case.index, case.lut, columns, SINGLE), case.dense(SINGLE))


@pytest.mark.parametrize("lut", [HALF, BRAIN, SINGLE])
@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE])
def test_every_dtype(sketch, dtype, lut):
    case = sketch(37, 90, 4, 2, dtype=lut)
    case.lut[5, 0, :4] = torch.tensor([torch.inf, -torch.inf, -0.0, 6e-8])
    wanted = case.dense(SINGLE).to(dtype)
    found = decode.decode(case.index, case.lut, 90, dtype)
    same(found.view(torch.uint8), wanted.view(torch.uint8))


def test_ids_need_not_lie_side_by_side(sketch):
    case = sketch(37, 45, 4)
    ids = torch.tensor([[5, 30, 2], [7, 0, 36]])
    for each in (ids[:, ::2], ids[:, -1:], ids.T, torch.tensor([9]).expand(4)):
        same(decode.gather(each, case.index, case.lut, 45, SINGLE), case.dense(SINGLE)[each])


@pytest.mark.parametrize("ids", [[3], [0, 36, 36, 5, 0, 17, 2], list(range(37)) * 2])
def test_look_up(sketch, ids):
    case = sketch(37, 96, 3, 1)
    chosen = torch.tensor(ids, dtype=torch.int32)
    for order in ("planes-le", "device"):
        found = decode.gather(chosen, case.on(order), case.lut, 96, BRAIN, order)
        same(found, case.dense(BRAIN)[ids])


def test_look_up_keeps_the_shape_of_the_ids(sketch):
    case = sketch(7, 45, 5)
    ids = torch.tensor([[1, 2, 3], [6, 0, 1]])
    same(decode.gather(ids, case.index, case.lut, 45, HALF), case.dense(HALF)[ids])
    none = torch.empty(2, 0, dtype=torch.int64)
    assert decode.gather(none, case.index, case.lut, 45, HALF).shape == (2, 0, 45)


def test_an_id_outside_of_the_sketch_reads_nothing(sketch):
    case = sketch(7, 45, 5)
    ids = torch.tensor([7, 1, -1, 2**40])
    found = decode.gather(ids, case.index, case.lut, 45, SINGLE)
    same(found[1], case.dense(SINGLE)[1])
    assert found[[0, 2, 3]].isnan().all()


def test_a_sketch_without_rows(sketch):
    case = sketch(7, 45, 5)
    found = decode.gather(torch.tensor([0]), case.index[:0], case.lut[:0], 45, SINGLE)
    assert found.isnan().all()
    assert found.shape == (1, 45)


def test_the_order_on_the_device(sketch):
    case = sketch(37, 192, 3, 2)
    assert layout.repacked(3, 96)
    same(decode.decode(case.on("device"), case.lut, 192, HALF, "device"), case.dense(HALF))
    assert not torch.equal(decode.decode(case.on("device"), case.lut, 192, HALF), case.dense(HALF))


def test_an_unknown_order_is_refused(sketch):
    case = sketch(5, 45, 4)
    with pytest.raises(ValueError, match='layout is "rows", must be "planes-le" or "device"'):
        decode.decode(case.index, case.lut, 45, HALF, "rows")


@pytest.mark.parametrize("order", ["planes-le", "device"])
def test_float64_goes_through_plain_torch(sketch, order):
    case = sketch(7, 64, 3)
    same(decode.decode(case.on(order), case.lut, 64, torch.float64, order), case.dense())
    ids = torch.tensor([[1, 6]])
    found = decode.gather(ids, case.on(order), case.lut, 64, torch.float64, order)
    same(found, case.dense()[ids])


def test_a_part_of_a_bigger_sketch(sketch):
    case = sketch(8, 90, 3, 2)
    found = decode.decode(case.index[::2], case.lut[::2], 90, HALF)
    same(found, case.dense(HALF)[::2])
