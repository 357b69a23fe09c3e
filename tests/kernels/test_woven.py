"""The order `woven`: its definition, and the kernels that read it against the NumPy reference."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from sketchconv.kernels import dequantize, dispatch, gemv, gradients, reference_linear, woven
from sketchconv.kernels.orders import PLANES, WOVEN
from sketchconv.kernels.packed import Packed
from sketchconv.kernels.planes import pack_rows, packed_size

reason = dispatch.why_not(dispatch.AVX512_FEATURES)
avx512 = pytest.mark.skipif(reason is not None, reason=f"avx512: {reason}")
LUTS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
# rows, groups, columns: one block, several, tails of every kind, a group of odd bytes
SHAPES = (
    *((4, 1, 512), (5, 3, 1536), (3, 1, 1300), (3, 2, 1200), (2, 1, 1153), (9, 1, 2048)),
    *((7, 1, 576), (3, 2, 1270), (2, 1, 1023), (3, 1, 704)),
)


def make(rows, groups, columns, lut="F16", seed=0):
    """Codes, and the same matrix in both orders."""
    rng = np.random.default_rng([seed, rows, groups, columns])
    codes = rng.integers(0, 8, (rows, columns)).astype(np.uint8)
    index = torch.from_numpy(pack_rows(codes, 3, groups))
    table = torch.from_numpy(rng.standard_normal((rows, groups, 8))).to(LUTS[lut])
    return codes, Packed.of(index, table, columns), turned(index, table, columns)


def turned(index, table, columns):
    changed = woven.weave(index, 3, columns // table.shape[1])
    return Packed.of(changed, table, columns, WOVEN)


def carrier(lut):
    return lut.view(torch.uint16).numpy() if lut.dtype is torch.bfloat16 else lut.numpy()


def dense(matrix):
    return reference_linear.dequantize(matrix.index.numpy(), carrier(matrix.lut), matrix.columns)


def codes_of_block(part):
    """The 512 codes in 192 bytes, as the docstring of `woven` describes them."""
    words = np.frombuffer(part.tobytes(), "<u4").reshape(3, 16)
    return four_columns(
        [[int(words[w, lane]) >> 4 * nibble & 15 for w in range(3)] for lane in range(16)]
        for nibble in range(8)
    )


def codes_of_short_block(part):
    """The 64 codes in 24 bytes."""
    words = np.frombuffer(part.tobytes(), "<u4").reshape(3, 2)
    return four_columns(
        [[int(words[w, lane % 2]) >> 4 * (lane // 2) & 15 for w in range(3)] for lane in range(16)]
        for _ in range(1)
    )


def four_columns(nibbles):
    codes = []
    for lanes in nibbles:
        found = [(a >> 1, b & 1 | b >> 2 << 1, c & 3 | c >> 3 << 2, a ^ b ^ c) for a, b, c in lanes]
        codes += [code & 7 for column in zip(*found, strict=True) for code in column]
    return np.array(codes, np.uint8)


def unwoven(part, columns):
    """All codes of a group."""
    codes, done = [], 0
    for size, read in ((512, codes_of_block), (64, codes_of_short_block)):
        while columns - done >= size:
            codes.append(read(part[done // 8 * 3 : (done + size) // 8 * 3]))
            done += size
    if done < columns:
        rest = part[done // 8 * 3 :].reshape(1, 1, -1)
        codes.append(reference_linear.unpack(rest, 3, columns - done)[0])
    return np.concatenate(codes)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_order_is_what_its_description_says(shape):
    rows, groups, columns = shape
    codes, plain, turn = make(*shape)
    width = columns // groups
    expected = codes.reshape(rows * groups, width)
    for got, wanted in zip(turn.index.view(rows * groups, -1).numpy(), expected, strict=True):
        assert (unwoven(got, width) == wanted).all()
    back = woven.restore(turn.index, 3, width)
    assert torch.equal(back, plain.index)
    assert turn.index.shape == plain.index.shape
    assert not torch.equal(turn.index, plain.index)


def test_no_thread_changes_a_byte():
    index = torch.randint(0, 256, (70, 2, packed_size(1100, 3)), dtype=torch.uint8)
    one = woven.weave(index, 3, 1100, threads=1)
    for threads in (2, 3):
        assert torch.equal(woven.weave(index, 3, 1100, threads=threads), one)
        assert torch.equal(woven.restore(one, 3, 1100, threads=threads), index)


def test_other_widths_keep_their_order():
    for bits, columns in ((3, 511), (4, 512), (2, 4096)):
        index = torch.zeros(2, 1, packed_size(columns, bits), dtype=torch.uint8)
        assert woven.weave(index, bits, columns) is index
        assert woven.restore(index, bits, columns) is index
        lut = torch.zeros(2, 1, 2**bits)
        assert Packed.of(index, lut, columns, WOVEN).order == PLANES
    with pytest.raises(ValueError, match="uint8 of 192 bytes"):
        woven.weave(torch.zeros(2, 1, 190, dtype=torch.uint8), 3, 512)
    with pytest.raises(ValueError, match="the order is 'device'"):
        Packed.of(index, lut, 4096, "device")


@pytest.mark.parametrize("kernel", ["avx2", "portable"])
def test_other_kernels_refuse_it(kernel):
    if kernel == "avx2" and dispatch.why_not(dispatch.AVX2_FEATURES):
        pytest.skip("no AVX2")
    choice = dispatch.choose(kernel)
    assert choice.orders == (PLANES,)
    with pytest.raises(ValueError, match="reads an index in the order 'planes-le'"):
        choice.multiply(3, "F16", WOVEN)
    with pytest.raises(ValueError, match="not 'woven'"):
        choice.decode(3, "F16", "F32", WOVEN)


@avx512
@pytest.mark.parametrize("shape", SHAPES)
def test_products_match_the_reference(shape):
    _, plain, turn = make(*shape)
    weight = dense(plain).astype(np.float64)
    for tokens in (1, 2, 5, 7):
        x = torch.randn(tokens, shape[2], generator=torch.Generator().manual_seed(tokens))
        expected = x.double().numpy() @ weight.T
        slack = (shape[2] + 2) * 2.0**-24 * (np.abs(x.double().numpy()) @ np.abs(weight).T)
        assert (np.abs(gemv.multiply(turn, x).numpy() - expected) <= slack + 1e-30).all()
        short = x.bfloat16()
        expected = short.double().numpy() @ weight.T
        found = gemv.multiply(turn, short).double().numpy()
        assert (np.abs(found - expected) <= 2.0**-8 * np.abs(expected) + 2 * slack).all()


@avx512
@pytest.mark.parametrize("lut", LUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_decoded_exactly(shape, lut):
    _, plain, turn = make(*shape, lut)
    expected = torch.from_numpy(dense(plain))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(dequantize.decode(turn, dtype), expected.to(dtype))
        assert torch.equal(dequantize.decode(turn, dtype, 1, 2), expected[1:2].to(dtype))
        ids = torch.tensor([[1, 0], [1, 1]])
        assert torch.equal(dequantize.gather(turn, ids, dtype), expected[ids].to(dtype))


@avx512
@pytest.mark.parametrize("lut", LUTS)
def test_nan_infinity_and_extremes_stay_what_they_are(lut):
    _, plain, turn = make(3, 1, 1153, lut)
    values = (torch.nan, torch.inf, -torch.inf, -0.0, 6e-8, torch.finfo(LUTS[lut]).max, 0.0, 1.0)
    plain.lut[0, 0] = torch.tensor(values, dtype=LUTS[lut])
    expected = dense(plain)
    decoded = dequantize.decode(turn)
    assert np.array_equal(decoded.numpy().view(np.uint32), expected.view(np.uint32))
    assert torch.equal(decoded[1:].bfloat16(), dequantize.decode(turn, torch.bfloat16, 1))
    rounded = dequantize.decode(turn, torch.bfloat16)
    assert torch.equal(rounded.isnan(), decoded.isnan())
    assert torch.equal(rounded.nan_to_num(7), decoded.bfloat16().nan_to_num(7))
    y = gemv.multiply(turn, torch.ones(1, 1153))
    assert torch.equal(y.isnan(), torch.tensor([[True, False, False]]))


@avx512
def test_hard_rows():
    columns = 1153
    codes, _, _ = make(7, 1, columns)
    table = np.random.default_rng(3).standard_normal((7, 1, 8)).astype(np.float32)
    codes[0], table[1], codes[2], table[4] = 7, 0.375, 0, 0
    codes[2, columns // 2], table[2, 0, -1] = 7, 3e4
    codes[3] = np.arange(columns) % 2 * 7
    table[5] *= 2.0**-18
    table[6] = np.where(np.arange(8) % 2, 6e4, -6e4)
    index, lut = torch.from_numpy(pack_rows(codes, 3, 1)), torch.from_numpy(table).half()
    turn = turned(index, lut, columns)
    weight = dense(Packed.of(index, lut, columns)).astype(np.float64)
    x = torch.randn(2, columns, generator=torch.Generator().manual_seed(4))
    x[:, -1] = 100.0  # what is lost or doubled at the end of a row shows
    slack = (columns + 2) * 2.0**-24 * (np.abs(x.double().numpy()) @ np.abs(weight).T) + 1e-30
    y = gemv.multiply(turn, x).numpy()
    assert (np.abs(y - x.double().numpy() @ weight.T) <= slack).all()
    assert (y[:, 4] == 0).all()
    assert np.array_equal(dequantize.decode(turn).numpy(), weight.astype(np.float32))


@avx512
def test_a_token_has_the_result_that_it_has_alone():
    _, _, turn = make(21, 2, 2400)
    run = dispatch.choose("avx512").multiply(3, "F16", WOVEN)

    def span(x, begin, end):
        y = torch.full((x.shape[0], 21), torch.nan, dtype=x.dtype)
        half, pointers = x.dtype is torch.bfloat16, (turn.index_pointer, turn.lut_pointer)
        run(begin, end, *pointers, x.data_ptr(), y.data_ptr(), half, x.shape[0], 21, 2, 1200)
        return y

    x = torch.randn(9, 2400, generator=torch.Generator().manual_seed(1))
    for some in (x, x.bfloat16()):
        alone = torch.cat([span(some[i : i + 1].clone(), 0, 21) for i in range(9)])
        for tokens in range(1, 10):
            assert torch.equal(span(some[:tokens].clone(), 0, 21), alone[:tokens])
        for tokens in (1, 9):
            part = span(some[:tokens].clone(), 5, 18)
            assert torch.equal(part[:, 5:18], alone[:tokens, 5:18])
            assert torch.isnan(part[:, :5]).all()
            assert torch.isnan(part[:, 18:]).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_by_code_are_those_of_the_disk(shape):
    _, plain, turn = make(*shape)
    values = torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(2))
    rows = torch.arange(shape[0]).flip(0)
    assert torch.equal(
        gradients.sum_by_code(turn, rows, values), gradients.sum_by_code(plain, rows, values)
    )


@avx512
def test_gradients_are_those_of_the_disk():
    _, plain, turn = make(9, 2, 1200)
    generator = torch.Generator().manual_seed(3)
    grad, x = (torch.randn(4, n, generator=generator) for n in (9, 1200))
    for dtype in (torch.float32, torch.bfloat16):
        args = (grad.to(dtype), x.to(dtype))
        assert torch.equal(gradients.grad_lut(turn, *args), gradients.grad_lut(plain, *args))
        assert torch.equal(
            gradients.grad_input(turn, args[0]), gradients.grad_input(plain, args[0])
        )


@avx512
@pytest.mark.parametrize("lut", ["F16", "F32"])
def test_no_read_beyond_the_last_byte(lut, tmp_path):
    """The last row ends at the end of a mapped page; the page after it cannot be read."""
    code = f"""
import ctypes, mmap, torch
from sketchconv.kernels import gemv, dequantize
from sketchconv.kernels.packed import Packed
from sketchconv.kernels.planes import packed_size
libc = ctypes.CDLL(None, use_errno=True)
def guarded(size):
    page = mmap.PAGESIZE
    room = -(-size // page) * page
    area = mmap.mmap(-1, room + page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert libc.mprotect(ctypes.c_void_p(base + room), page, 0) == 0
    return area, torch.frombuffer(area, dtype=torch.uint8, count=size, offset=room - size)
for columns in (512, 513, 576, 639, 1024, 1300):
    _, index = guarded(5 * packed_size(columns, 3))
    _, lut = guarded(5 * 8 * {4 if lut == "F32" else 2})
    lut = lut.view({LUTS[lut]}).view(5, 1, -1)
    matrix = Packed.of(index.view(5, 1, -1), lut, columns, "woven")
    for dtype in (torch.float32, torch.bfloat16):
        _, x = guarded(dtype.itemsize * columns)
        gemv.multiply(matrix, x.view(dtype).view(1, columns))
        _, out = guarded(5 * columns * dtype.itemsize)
        dequantize.decode_into(matrix, out.view(dtype).view(5, columns))
print("sound")
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs mprotect")
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ),
    )
    assert done.stdout == "sound\n", done.stderr[-2000:]
