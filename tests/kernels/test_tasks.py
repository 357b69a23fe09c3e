"""Products of several tasks on the CPU against the plain reference and against each task alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sketchconv.kernels import dispatch, gemv, plain, tasks, woven
from sketchconv.kernels.orders import WOVEN
from sketchconv.kernels.packed import Packed
from sketchconv.kernels.planes import pack_rows


def candidate(name, needs):
    reason = dispatch.why_not(needs)
    return pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))


KERNELS = (
    candidate("avx512", (*dispatch.AVX512_FEATURES, "avx512vbmi")),
    candidate("avx512-avx512vbmi", dispatch.AVX512_FEATURES),
    candidate("avx2", dispatch.AVX2_FEATURES),
    "portable",
)
LUTS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
# One task after another, in turns, runs of every length, more tokens than are few
BATCHES = (
    (0, 1, 2, 3),
    (2,),
    (1, 0, 1),
    (0, 0, 1, 2, 2, 2, 2, 2, 3, 0),
    (3, 3, 3, 3, 3, 3, 0, 1, 2, 1, 2),
    (1,) * 9 + (0, 2) + (3,) * 11,
)


def hard(bits, columns, count, lut):
    """Codes and LUTs of `count` tasks: constant, ties, an outlier, two values, zeros, far apart."""
    rng = np.random.default_rng([bits, columns])
    codes = rng.integers(0, 2**bits, (70, columns)).astype(np.uint8)
    codes[0] = 2**bits - 1
    codes[2] = 0
    codes[2, columns // 2] = 2**bits - 1
    codes[3] = np.arange(columns) % 2 * (2**bits - 1)
    groups = 3 if columns % 3 == 0 else 1
    tables = rng.standard_normal((count, 70, groups, 2**bits)).astype(np.float32)
    tables[:, 1] = 0.375
    tables[:, 2, :, -1] = 3e4
    tables[1, 4] = 0
    tables[-1, 5] *= 2.0**-18
    tables[:, 6] = np.where(np.arange(2**bits) % 2, 6e4, -6e4)
    index = torch.from_numpy(pack_rows(codes, bits, groups))
    return index, torch.from_numpy(tables).to(LUTS[lut])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_each_token_has_its_tasks_product(kernel, bits):
    for columns in (77, 1290):
        lut = list(LUTS)[bits % 3]
        index, luts = hard(bits, columns, 4, lut)
        matrices = [Packed.of(index, each, columns) for each in luts]
        for batch in BATCHES:
            x = torch.randn(len(batch), columns, generator=torch.Generator().manual_seed(bits))
            x[:, -1] = 100.0
            y = tasks.multiply_tasks(matrices, x, batch, kernel)
            expected = plain.multiply_tasks(x.double(), index, luts.double(), torch.tensor(batch))
            dense = torch.stack([plain.decode(index, e, columns, torch.float64) for e in luts])
            spread = torch.einsum("tc,trc->tr", x.double().abs(), dense[list(batch)].abs())
            bound = (columns + 2) * 2.0**-24 * spread + 1e-30
            assert ((y - expected).abs() <= bound).all(), (columns, batch)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_tokens_bits_are_those_of_its_task_alone(kernel, dtype):
    for bits in (3, 4, 5):
        index, luts = hard(bits, 600, 4, "F16")
        matrices = [Packed.of(index, each, 600) for each in luts]
        for batch in BATCHES:
            x = torch.randn(len(batch), 600, generator=torch.Generator().manual_seed(9)).to(dtype)
            y = tasks.multiply_tasks(matrices, x, batch, kernel)
            assert y.dtype is dtype
            for task in set(batch):
                own = [t for t, mine in enumerate(batch) if mine == task]
                if len(own) <= gemv.FEW_TOKENS:
                    alone = gemv.multiply(matrices[task], x[own], kernel)
                    assert torch.equal(y[own], alone), (bits, batch, task)


@pytest.mark.skipif(dispatch.why_not(dispatch.AVX512_FEATURES) is not None, reason="AVX-512")
def test_woven_indices_give_the_same():
    index, luts = hard(3, 1800, 4, "F16")
    order = woven.weave(index, 3, 600)
    matrices = [Packed.of(order, each, 1800, WOVEN) for each in luts]
    assert matrices[0].order == WOVEN
    for batch in BATCHES:
        x = torch.randn(len(batch), 1800, generator=torch.Generator().manual_seed(3))
        y = tasks.multiply_tasks(matrices, x, batch)
        for token, task in enumerate(batch):
            if batch.count(task) <= gemv.FEW_TOKENS:
                assert torch.equal(y[token], gemv.multiply(matrices[task], x[token]))


def test_threads_change_nothing(monkeypatch):
    index, luts = hard(4, 600, 4, "F16")
    matrices = [Packed.of(index, each, 600) for each in luts]
    x = torch.randn(4, 600)
    expected = tasks.multiply_tasks(matrices, x, (0, 1, 2, 3))
    monkeypatch.setattr(gemv, "PARALLEL_WEIGHTS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for _ in range(20):
        assert torch.equal(tasks.multiply_tasks(matrices, x, (0, 1, 2, 3)), expected)


def test_what_does_not_fit_is_refused():
    index, luts = hard(4, 77, 2, "F16")
    first, second = (Packed.of(index, each, 77) for each in luts)
    other = Packed.of(index.clone(), luts[0], 77)
    x = torch.randn(2, 77)
    with pytest.raises(ValueError, match="share one index"):
        tasks.multiply_tasks([first, other], x, (0, 1))
    with pytest.raises(ValueError, match="tokens by columns"):
        tasks.multiply_tasks([first, second], x, (0, 1, 0))
    with pytest.raises(IndexError, match="task 2"):
        tasks.multiply_tasks([first, second], x, (0, 2))
    with pytest.raises(ValueError, match="must be float"):
        tasks.multiply_tasks([first, second], x.double(), (0, 1))
    assert tasks.multiply_tasks([first, second], x[:0], ()).shape == (0, 70)
