"""The CPU kernels against the NumPy reference: all bits, tails, groups, LUT dtypes and paths."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest
import torch

from sketchconv.formats.tensors import f32_to_bf16
from sketchconv.kernels import dequantize, dispatch, gemv, reference_linear
from sketchconv.kernels.packed import Packed
from sketchconv.kernels.planes import pack_rows, packed_size


def candidate(name, needs):
    reason = dispatch.why_not(needs)
    skip = pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}")
    return pytest.param(name, marks=skip)


VBMI = "avx512vbmi"
KERNELS = (
    candidate("avx512", (*dispatch.AVX512_FEATURES, VBMI)),
    candidate(f"avx512-{VBMI}", dispatch.AVX512_FEATURES),
    candidate("avx2", dispatch.AVX2_FEATURES),
    "portable",
)
LUTS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
# rows, groups, columns: below one block, tails of every plane, several groups, several blocks
SHAPES = (
    (5, 1, 1),
    (3, 1, 7),
    (6, 3, 45),
    (4, 2, 600),
    (3, 1, 1300),
    (2, 1, 128),
    (7, 5, 640),
    (3, 9, 333),
    (2, 2, 768),
)


def make(bits, rows, groups, columns, lut="F16", seed=0):
    rng = np.random.default_rng([seed, bits, rows, groups, columns])
    codes = rng.integers(0, 2**bits, (rows, columns)).astype(np.uint8)
    index = torch.from_numpy(pack_rows(codes, bits, groups))
    table = torch.from_numpy(rng.standard_normal((rows, groups, 2**bits))).to(LUTS[lut])
    return codes, Packed.of(index, table, columns)


def carrier(lut):
    return lut.view(torch.uint16).numpy() if lut.dtype is torch.bfloat16 else lut.numpy()


def dense(matrix):
    return reference_linear.dequantize(matrix.index.numpy(), carrier(matrix.lut), matrix.columns)


def bound(matrix, x, unit):
    """Rounding of a sum of n products: n * unit * sum |x| |w|, in float64."""
    spread = np.abs(x.double().numpy()) @ np.abs(dense(matrix).astype(np.float64)).T
    return (matrix.columns + 2) * unit * spread + 1e-30


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_reference_decodes_what_was_packed(bits):
    codes, matrix = make(bits, 4, 3, 45)
    assert (reference_linear.unpack(matrix.index.numpy(), bits, 45) == codes).all()
    table = matrix.lut.float().numpy()
    expected = [[table[r, c // 15, codes[r, c]] for c in range(45)] for r in range(4)]
    assert (dense(matrix) == np.array(expected)).all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_products_match_the_reference(kernel, bits):
    for shape in SHAPES:
        _, matrix = make(bits, *shape)
        for tokens in (1, 2, 5):
            x = torch.from_numpy(
                np.random.default_rng(tokens).standard_normal((tokens, shape[2])).astype(np.float32)
            )
            y = gemv.multiply(matrix, x, kernel)
            expected = reference_linear.linear(x.numpy(), matrix.index.numpy(), carrier(matrix.lut))
            error = np.abs(y.numpy() - expected)
            assert (error <= bound(matrix, x, 2.0**-24)).all(), (shape, tokens)
            assert y.dtype is torch.float32
            assert y.shape == (tokens, shape[0])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_rows_are_decoded_exactly(kernel, bits):
    for shape in SHAPES:
        _, matrix = make(bits, *shape)
        expected = torch.from_numpy(dense(matrix))
        assert torch.equal(dequantize.decode(matrix, kernel=kernel), expected)
        rounded = dequantize.decode(matrix, torch.bfloat16, kernel=kernel)
        assert torch.equal(rounded, expected.bfloat16())
        assert torch.equal(dequantize.decode(matrix, begin=1, end=2, kernel=kernel), expected[1:2])
        ids = torch.tensor([[1, 0], [1, 1]])
        assert torch.equal(dequantize.gather(matrix, ids, kernel=kernel), expected[ids])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("lut", LUTS)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_every_lut_dtype_is_exact(kernel, lut, bits):
    _, matrix = make(bits, 5, 2, 150, lut)
    extreme = {"F16": (65504.0, 6e-8, -6.1e-5), "BF16": (3e38, 1e-40, -0.0)}.get(lut, (3e38, 1e-42))
    matrix.lut.view(-1)[: len(extreme)] = torch.tensor(extreme, dtype=LUTS[lut])
    decoded = dequantize.decode(matrix, kernel=kernel)
    assert np.array_equal(decoded.numpy().view(np.uint32), dense(matrix).view(np.uint32))


EXTREMES = {
    "F16": (np.uint16, (0x7FFF, 0xFE01, 0x7C01, 0x7C00, 0xFC00, 0x7BFF)),
    "BF16": (np.uint16, (0x7FFF, 0xFFC1, 0x7F81, 0x7F80, 0xFF80, 0x7F7F)),
    "F32": (np.uint32, (0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7F800000, 0xFF800000, 0x7F7FFFFF)),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("lut", LUTS)
@pytest.mark.parametrize("bits", [3, 8])
def test_nan_and_infinity_stay_what_they_are(kernel, lut, bits):
    """No file may hold them, but no kernel makes numbers of them; the last one rounds up."""
    _, matrix = make(bits, 4, 2, 150, lut)
    carried, patterns = EXTREMES[lut]
    words = torch.from_numpy(np.array(patterns * 2, carried)).view(LUTS[lut])
    matrix.lut.view(-1)[: words.numel()] = words
    expected = dense(matrix).copy()
    if lut == "F16":  # conversion in hardware makes NaN quiet, NumPy's may not
        expected.view(np.uint32)[np.isnan(expected)] |= np.uint32(0x00400000)
    decoded = dequantize.decode(matrix, kernel=kernel)
    assert np.isnan(expected).any()
    assert np.array_equal(decoded.numpy().view(np.uint32), expected.view(np.uint32))
    rounded = dequantize.decode(matrix, torch.bfloat16, kernel=kernel)
    assert np.array_equal(rounded.view(torch.uint16).numpy(), f32_to_bf16(expected))
    x = torch.ones(1, 150)
    for dtype in (torch.float32, torch.bfloat16):
        y = gemv.multiply(matrix, x.to(dtype), kernel).float().numpy()
        with np.errstate(invalid="ignore", over="ignore"):
            exact = expected.astype(np.float64).sum(1)
        assert np.array_equal(np.isnan(y[0]), np.isnan(exact))


@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_and_float16_activations(kernel):
    _, matrix = make(4, 33, 1, 576)
    x = torch.randn(3, 576, generator=torch.Generator().manual_seed(0))
    for dtype, unit in ((torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)):
        y = gemv.multiply(matrix, x.to(dtype), kernel)
        exact = torch.from_numpy(
            reference_linear.linear(
                x.to(dtype).float().numpy(), matrix.index.numpy(), carrier(matrix.lut)
            )
        )
        assert y.dtype is dtype
        slack = torch.from_numpy(bound(matrix, x, 2.0**-24))
        assert ((y.double() - exact).abs() <= exact.abs() * unit + 2 * slack).all()


def run(kernel, matrix, x, begin=0, end=None):
    """The kernel itself, without what `gemv` does for many tokens or threads."""
    y = torch.full((x.shape[0], matrix.rows), torch.nan, dtype=x.dtype)
    dispatch.choose(kernel).multiply(matrix.bits, matrix.lut_dtype)(
        begin,
        matrix.rows if end is None else end,
        matrix.index.data_ptr(),
        matrix.lut.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        x.dtype is torch.bfloat16,
        x.shape[0],
        matrix.rows,
        matrix.groups,
        matrix.group_columns,
    )
    return y


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("columns", [300, 2100])
def test_a_token_has_the_result_that_it_has_alone(kernel, bits, columns):
    """At any number of tokens, in any span of rows: the order of a row's sum is its own."""
    _, matrix = make(bits, 21, 2, columns)
    x = torch.randn(9, columns, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float32, torch.bfloat16):
        some = x.to(dtype)
        alone = torch.cat([run(kernel, matrix, some[i : i + 1].clone()) for i in range(9)])
        for tokens in range(1, 10):
            assert torch.equal(run(kernel, matrix, some[:tokens].clone()), alone[:tokens])
        part = run(kernel, matrix, some, 5, 18)
        assert torch.equal(part[:, 5:18], alone[:, 5:18])
        assert torch.isnan(part[:, :5]).all()
        assert torch.isnan(part[:, 18:]).all()


def hard_rows(bits, columns):
    """Codes and a LUT: a constant row, ties, one outlier, two values, zeros, huge and tiny ones."""
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (7, columns)).astype(np.uint8)
    table = rng.standard_normal((7, 1, 2**bits)).astype(np.float32)
    codes[0] = 2**bits - 1
    table[1] = 0.375
    codes[2] = 0
    codes[2, columns // 2] = 2**bits - 1
    table[2, 0, -1] = 3e4
    codes[3] = np.arange(columns) % 2 * (2**bits - 1)
    table[4] = 0
    table[5] *= 2.0**-18
    table[6] = np.where(np.arange(2**bits) % 2, 6e4, -6e4)
    return codes, table


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_hard_rows(kernel, bits):
    for columns in (77, 515):
        codes, table = hard_rows(bits, columns)
        index = torch.from_numpy(pack_rows(codes, bits, 1))
        matrix = Packed.of(index, torch.from_numpy(table).half(), columns)
        x = torch.randn(2, columns, generator=torch.Generator().manual_seed(4))
        x[:, -1] = 100.0  # what is lost or doubled at the end of a row shows
        expected = reference_linear.linear(x.numpy(), index.numpy(), carrier(matrix.lut))
        error = np.abs(run(kernel, matrix, x).numpy() - expected)
        assert (error <= bound(matrix, x, 2.0**-24)).all()
        assert (run(kernel, matrix, x)[:, 4] == 0).all()
        assert np.array_equal(dequantize.decode(matrix, kernel=kernel).numpy(), dense(matrix))


@pytest.mark.parametrize("kernel", KERNELS)
def test_compiled_code_can_call_the_kernels(kernel):
    _, matrix = make(4, 6, 1, 64)
    multiply = dispatch.choose(kernel).multiply(4, "F16")
    decode = dispatch.choose(kernel).decode(4, "F16", "F32")

    @numba.njit
    def both(index, tables, x, y, dense):
        multiply(0, 6, index, tables, x, y, False, 1, 6, 1, 64)
        decode(0, 6, index, tables, 0, dense, 1, 64)

    x, y, weight = torch.ones(1, 64), torch.empty(1, 6), torch.empty(6, 64)
    tensors = (matrix.index, matrix.lut, x, y, weight)
    both(*(tensor.data_ptr() for tensor in tensors))
    assert torch.equal(y, run(kernel, matrix, x))
    assert torch.equal(weight, torch.from_numpy(dense(matrix)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_threads_and_spans_do_not_change_a_bit(kernel, monkeypatch):
    _, matrix = make(4, 101, 1, 200)
    x = torch.randn(2, 200, generator=torch.Generator().manual_seed(2))
    one = x[:1].clone()
    serial, single = gemv.multiply(matrix, x, kernel), gemv.multiply(matrix, one, kernel)
    tile = dequantize.decode(matrix, kernel=kernel)
    monkeypatch.setattr(gemv, "PARALLEL_WEIGHTS", 1)
    monkeypatch.setattr(dequantize, "PARALLEL_WEIGHTS", 1)
    for threads in (2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        assert torch.equal(gemv.multiply(matrix, x, kernel), serial)
        assert torch.equal(gemv.multiply(matrix, one, kernel), single)
        assert torch.equal(dequantize.decode(matrix, kernel=kernel), tile)
        with ThreadPoolExecutor(4) as callers:
            runs = [callers.submit(gemv.multiply, matrix, x, kernel) for _ in range(8)]
            assert all(torch.equal(run.result(), serial) for run in runs)


@pytest.mark.parametrize("kernel", KERNELS)
def test_many_tokens_go_through_tiles(kernel, monkeypatch):
    _, matrix = make(3, 70, 3, 96)
    monkeypatch.setattr(gemv, "TILE_BYTES", 1)
    monkeypatch.setattr(gemv, "LEAST_ROWS", 32)
    x = torch.randn(2, 10, 96, generator=torch.Generator().manual_seed(3))
    y = gemv.multiply(matrix, x, kernel)
    weight = torch.from_numpy(dense(matrix))
    assert y.shape == (2, 10, 70)
    assert torch.allclose(y, x @ weight.T, atol=1e-4)
    short = gemv.multiply(matrix, x.bfloat16(), kernel)
    assert short.dtype is torch.bfloat16
    assert torch.allclose(short.float(), x @ weight.T, atol=0.5)
    assert gemv.multiply(matrix, x.half(), kernel).dtype is torch.float16


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("lut", "widths"), [("F16", range(1, 9)), ("F32", (3, 8))])
def test_no_read_beyond_the_last_byte(kernel, lut, widths, tmp_path):
    """The last row ends at the end of a mapped page; the page after it cannot be read."""
    code = f"""
import ctypes, mmap, numpy as np, torch
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
for bits in {tuple(widths)}:
    for columns in (1, 33, 128, 130, 134, 600):
        _, index = guarded(5 * packed_size(columns, bits))
        _, lut = guarded(5 * 2**bits * {4 if lut == "F32" else 2})
        lut = lut.view({LUTS[lut]})
        matrix = Packed.of(index.view(5, 1, -1), lut.view(5, 1, -1), columns)
        for dtype in (torch.float32, torch.bfloat16):
            _, x = guarded(dtype.itemsize * columns)
            gemv.multiply(matrix, x.view(dtype).view(1, columns), kernel="{kernel}")
        _, out = guarded(5 * columns * 4)
        dequantize.decode_into(matrix, out.view(torch.float32).view(5, columns), kernel="{kernel}")
        _, out = guarded(5 * columns * 2)
        dequantize.decode_into(matrix, out.view(torch.bfloat16).view(5, columns), kernel="{kernel}")
print("sound", {packed_size(7, 3)})
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs mprotect")
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("sound")


def run_python(code, folder, *args, **environment):
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *args],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_a_choice_carries_its_reasons():
    choice = dispatch.choose()
    assert choice.name in ("avx512", "avx2", "portable")
    assert choice.reason
    forced = dispatch.choose("portable")
    assert [r.name for r in forced.rejected] == ["avx512", "avx2"]
    assert "was asked for" in forced.rejected[0].reason
    with pytest.raises(ValueError, match="no kernels named 'cuda'"):
        dispatch.choose("cuda")


CACHED = """
import sys, torch
from sketchconv.kernels import dequantize, dispatch, gemv
from sketchconv.kernels.packed import Packed
matrix = Packed.of(torch.zeros(4, 1, 32, dtype=torch.uint8), torch.ones(4, 1, 16).half(), 64)
gemv.multiply(matrix, torch.ones(1, 64), sys.argv[1])
dequantize.decode(matrix, kernel=sys.argv[1])
choice = dispatch.choose(sys.argv[1])
for run in (choice.multiply(4, "F16"), choice.decode(4, "F16", "F32")):
    print(sum(run.stats.cache_hits.values()), sum(run.stats.cache_misses.values()))
"""


@pytest.mark.parametrize("kernel", KERNELS)
def test_another_process_finds_the_compiled_code(kernel, tmp_path):
    """A closure over anything but plain values would be compiled again in each process."""
    cache = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    first = run_python(CACHED, tmp_path, kernel, **cache)
    assert first.stdout.split() == ["0", "1", "0", "1"], first.stderr[-2000:]
    second = run_python(CACHED, tmp_path, kernel, **cache)
    assert second.stdout.split() == ["1", "0", "1", "0"], second.stderr[-2000:]


@pytest.mark.parametrize("name", dispatch.OVERRIDES)
def test_numba_overrides_choose_the_portable_path(monkeypatch, name):
    for other in dispatch.OVERRIDES:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "generic")
    for needs in (dispatch.AVX512_FEATURES, dispatch.AVX2_FEATURES):
        assert name in dispatch.why_not(needs)
    assert dispatch.why_not(()) is None


@pytest.mark.parametrize(
    ("features", "first"),
    [
        ({*dispatch.AVX512_FEATURES, *dispatch.AVX2_FEATURES}, "avx512"),
        ({*dispatch.AVX512_FEATURES, *dispatch.AVX2_FEATURES} - {"avx512bw"}, "avx2"),
        ({*dispatch.AVX2_FEATURES} - {"f16c"}, "portable"),
        (set(), "portable"),
    ],
)
def test_the_fastest_kernels_that_a_cpu_can_run(monkeypatch, features, first):
    for name in dispatch.OVERRIDES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dispatch, "cpu_features", lambda: frozenset(features))
    choice = dispatch.choose.__wrapped__()
    assert choice.name == first
    for rejected in choice.rejected:
        assert rejected.reason.startswith("this CPU lacks ")


@pytest.mark.parametrize("name", ["generic", "haswell"])
def test_an_overridden_cpu_runs_the_portable_path(tmp_path, name):
    code = """
import torch
from sketchconv.kernels import gemv, dispatch
from sketchconv.kernels.packed import Packed
x, index = torch.ones(1, 8), torch.full((1, 1, 4), 0x21, dtype=torch.uint8)
y = gemv.multiply(Packed.of(index, torch.arange(16.0).view(1, 1, 16), 8), x)
print(dispatch.choose().name, y.item(), dispatch.choose().rejected[0].reason)
"""
    cache = {"NUMBA_CPU_NAME": name, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    done = run_python(code, tmp_path, **cache)
    assert done.stdout.startswith("portable 12.0 NUMBA_CPU_NAME is set"), done.stderr[-2000:]


def test_tensors_that_do_not_fit_are_refused():
    index, lut = torch.zeros(2, 1, 4, dtype=torch.uint8), torch.zeros(2, 1, 16)
    assert Packed.of(index, lut, 8).bits == 4
    wrong = [
        (index, lut, 9, "take 5 bytes"),
        (index, torch.zeros(2, 1, 12), 8, "power of two"),
        (index, torch.zeros(2, 1, 512), 8, "2 to 256"),
        (index, torch.zeros(3, 1, 16), 8, "do not fit together"),
        (index.int(), lut, 8, "must be uint8"),
        (index, lut.double(), 8, "must be uint8"),
        (index.expand(2, 1, 4)[..., ::2].repeat(1, 1, 2)[:, :, ::2], lut, 4, "contiguous"),
        (torch.zeros(2, 3, 2, dtype=torch.uint8), torch.zeros(2, 3, 16), 8, "do not divide"),
        (index.to("meta"), lut.to("meta"), 8, "CPU memory"),
    ]
    for bad_index, bad_lut, columns, message in wrong:
        with pytest.raises(ValueError, match=message):
            Packed.of(bad_index, bad_lut, columns)


def test_arguments_that_do_not_fit_are_refused():
    _, matrix = make(4, 4, 1, 32)
    with pytest.raises(ValueError, match="x has 31 columns"):
        gemv.multiply(matrix, torch.zeros(1, 31))
    with pytest.raises(ValueError, match="float in CPU memory"):
        gemv.multiply(matrix, torch.zeros(1, 32, dtype=torch.float64))
    with pytest.raises(IndexError, match="id 4 is outside"):
        dequantize.gather(matrix, torch.tensor([0, 4]))
    with pytest.raises(IndexError, match="id -1 is outside"):
        dequantize.gather(matrix, torch.tensor([-1]))
    with pytest.raises(ValueError, match="rows 3 to 5"):
        dequantize.decode_into(matrix, torch.empty(2, 32), 3)
    with pytest.raises(ValueError, match="rows have 32 columns"):
        dequantize.decode_into(matrix, torch.empty(2, 31))
    assert dequantize.gather(matrix, torch.empty(0, dtype=torch.int64)).shape == (0, 32)
    assert gemv.multiply(matrix, torch.empty(0, 32)).shape == (0, 4)
    assert packed_size(32, 4) == matrix.index.shape[-1]


def test_the_result_is_a_new_plain_tensor_whatever_the_input_is():
    """It is made like `x`, and must take neither more from it nor from torch's defaults."""
    _, matrix = make(4, 4, 2, 600)
    with torch.inference_mode():
        x = torch.randn(3, 600)
        assert gemv.multiply(matrix, x).is_inference()
    expected = gemv.multiply(matrix, x.clone())
    across = torch.stack([x.clone(), x.clone()], dim=2)[..., 1]
    assert not across.is_contiguous()
    leaf = torch.nn.Parameter(x.clone())
    for given in (x, across, leaf, x.clone().requires_grad_() * 1):
        y = gemv.multiply(matrix, given)
        assert type(y) is torch.Tensor
        assert not y.is_inference()
        assert not y.requires_grad
        assert torch.equal(y, expected)
        assert gemv.multiply(matrix, given[0]).shape == (4,)
    with torch.device("meta"):
        assert torch.equal(gemv.multiply(matrix, leaf.detach()), expected)
    assert gemv.multiply(matrix, x.clone()[:0]).shape == (0, 4)
