"""The column loop of calibration against a plain torch loop, and the rounds that follow it.

Both round a weight column by column with the error compensated, in blocks of 128 columns, on one
thread; the codes must be the same.

    python tests/bench/bench_column_loop.py [--rows 1024] [--columns 4096] [--bits 4] [--rounds 5]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from sketchconv.kernels import calibration_reference as reference
from sketchconv.kernels.compensation import BLOCK, compensate
from sketchconv.kernels.cpu import solve_rows
from sketchconv.kernels.descent import descend
from sketchconv.kernels.refit import refit
from sketchconv.kernels.tables import decode, make_tables

sys.path.append(str(Path(__file__).parent))
from timing import Contender, compete, ratio


def plain_loop(weight: Tensor, upper: Tensor, entries: Tensor) -> Tensor:
    """The loop as it is usually written: float32, one column at a time, one LUT per row."""
    work = weight.clone()
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for begin in range(0, work.shape[1], BLOCK):
        end = min(begin + BLOCK, work.shape[1])
        block, errors = work[:, begin:end].clone(), torch.zeros_like(work[:, begin:end])
        square = upper[begin:end, begin:end]
        for j in range(end - begin):
            code = (block[:, j, None] - entries).abs().argmin(1)
            error = (block[:, j] - entries.gather(1, code[:, None])[:, 0]) / square[j, j]
            block[:, j:] -= error[:, None].matmul(square[j, j:][None])
            codes[:, begin + j], errors[:, j] = code.to(torch.uint8), error
        work[:, end:] -= errors @ upper[begin:end, end:]
    return codes


def second_moments(columns: int) -> Tensor:
    """Of correlated inputs of unequal size, damped by .03 of the mean of the diagonal."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(2 * columns, columns, generator=generator) @ (mix + torch.eye(columns))
    x *= torch.rand(columns, generator=generator) + 0.1
    hessian = x.T @ x / x.shape[0]
    hessian.diagonal().add_(0.03 * hessian.diagonal().mean())
    return hessian


def main() -> None:
    """Print the times and whether the codes agree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)

    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(options.rows, options.columns, generator=generator) * 0.02
    hessian = second_moments(options.columns)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian.double()), upper=True).float()
    lut = torch.from_numpy(solve_rows(weight.numpy(), options.bits, 1, lut_dtype="F32").lut)
    tables = make_tables(lut, torch.zeros(options.columns, dtype=torch.int64))

    codes = compensate(weight, upper, tables)
    gradient = (weight - decode(codes, lut, tables.groups)) @ hessian
    loop = Contender("column loop", lambda: compensate(weight, upper, tables))
    plain = Contender("plain torch loop", lambda: plain_loop(weight, upper, lut[:, 0]))
    product = Contender("product with H", lambda: weight @ hessian)
    sweep = Contender("sweep of descent", lambda: descend(codes, gradient, hessian, tables))
    fit = Contender("refit, 3 steps", lambda: refit(codes, gradient, hessian, tables, 3))
    contenders = (loop, plain, product, sweep, fit)
    compete(contenders, options.rounds)

    print(f"{options.rows} x {options.columns}, {options.bits} bits, one thread")
    for contender in contenders:
        print(f"  {contender.name:18} {contender.median:8.3f} s")
    print(f"  plain / ours: {ratio(plain.median, loop.median, 's', digits=3)}")
    expected = reference.compensate(weight, upper, lut, tables.groups, BLOCK)
    differ = [int((codes != c).sum()) for c in (expected, plain_loop(weight, upper, lut[:, 0]))]
    print(f"  codes that differ from the reference: {differ[0]}, from the plain loop: {differ[1]}")


if __name__ == "__main__":
    main()
