"""What `bench_gpu.py` times: each operation on sketches, and what torch does with dense weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

LAYERS, HEAD_ROWS = 32, 32000
# rows x columns of LLaMA-2-7B: q, k, v, o; gate, up; down
LINEARS = (*((4096, 4096),) * 4, *((11008, 4096),) * 2, (4096, 11008))
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))


@dataclass(frozen=True, slots=True)
class Setting:
    """Where and how everything runs."""

    device: str
    dtype: Any
    bits: int
    groups: int
    layout: str


@dataclass(frozen=True, slots=True)
class Sketch:
    """A random sketched matrix on the device, in the order that the kernels read."""

    index: Any
    lut: Any
    columns: int

    @staticmethod
    def make(rows: int, columns: int, setting: Setting) -> Sketch:
        """Any bytes are valid codes; LUT entries are normal, and sums over columns stay near 1."""
        import torch

        from sketchconv.kernels.gpu.layout import repack
        from sketchconv.kernels.planes import packed_size

        width, device = columns // setting.groups, setting.device
        size = packed_size(width, setting.bits)
        shape = (rows, setting.groups)
        index = torch.randint(0, 256, (*shape, size), dtype=torch.uint8, device=device)
        lut = torch.randn(*shape, 2**setting.bits, device=device) / columns**0.5
        if setting.layout == "device":
            index = repack(index, setting.bits, width)
        return Sketch(index, lut.to(setting.dtype), columns)

    @property
    def nbytes(self) -> int:
        """Bytes of indices and LUT."""
        return int(self.index.nbytes + self.lut.nbytes)


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison.

    `ours` and `theirs` take the number of a copy, of which there are `copies`, so that matrices
    come from memory; `check` gives our result and that of plain torch on the same sketch. `nbytes`
    is what our side must at least move (`dense_nbytes`: the other side), `flops` what both compute.
    """

    title: str
    copies: int
    ours: Callable[[int], Any]
    theirs: Callable[[int], Any]
    check: Callable[[], tuple[Any, Any]]
    nbytes: int
    dense_nbytes: int
    flops: int


def cases(
    rows: int, columns: int, tokens: tuple[int, ...], copies: int, setting: Setting
) -> Iterator[Case]:
    """Products of each number of tokens, gradients of the largest, decoding, and look-ups."""
    import torch

    sketches = [Sketch.make(rows, columns, setting) for _ in range(copies)]
    dense = [torch.randn(rows, columns, device=setting.device, dtype=setting.dtype)]
    dense += [dense[0].clone() for _ in range(copies - 1)]
    for count in tokens:
        yield product(sketches, dense, count, setting)
    yield grad_input(sketches, dense, max(tokens), setting)
    yield grad_lut(sketches, dense, max(tokens), setting)
    yield decoded(sketches, dense, setting)
    yield looked_up(sketches, dense, max(tokens), setting)
    yield tasks(sketches, dense, min(8, max(tokens)), setting)


def _random(setting: Setting, *shape: int) -> Any:
    import torch

    return torch.randn(*shape, device=setting.device, dtype=setting.dtype)


def _planes(sketch: Sketch, setting: Setting) -> Any:
    """The index as it lies on disk, which is what plain torch reads."""
    from sketchconv.kernels.gpu.layout import restore

    if setting.layout != "device":
        return sketch.index
    return restore(sketch.index, setting.bits, sketch.columns // setting.groups)


def product(sketches: list[Sketch], dense: list[Any], tokens: int, setting: Setting) -> Case:
    """`x @ W.T`: GEMV, small batches and prefill, against cuBLAS."""
    from torch.nn.functional import linear

    from sketchconv.kernels import plain
    from sketchconv.kernels.gpu import ops

    rows, columns = dense[0].shape
    first, x = sketches[0], _random(setting, tokens, columns)
    moved = x.nbytes + tokens * rows * x.element_size()
    return Case(
        f"product, {tokens} token(s)",
        len(sketches),
        lambda n: ops.multiply(x, sketches[n].index, sketches[n].lut, layout=setting.layout),
        lambda n: linear(x, dense[n]),
        lambda: (
            ops.multiply(x, first.index, first.lut, layout=setting.layout),
            plain.multiply(x.float(), _planes(first, setting), first.lut.float()),
        ),
        first.nbytes + moved,
        dense[0].nbytes + moved,
        2 * tokens * rows * columns,
    )


def grad_input(sketches: list[Sketch], dense: list[Any], tokens: int, setting: Setting) -> Case:
    """`grad @ W`."""
    from sketchconv.kernels import plain
    from sketchconv.kernels.gpu import ops

    rows, columns = dense[0].shape
    first, grad = sketches[0], _random(setting, tokens, rows)
    moved = grad.nbytes + tokens * columns * grad.element_size()

    def ours(n: int) -> Any:
        index, lut = sketches[n].index, sketches[n].lut
        return ops.grad_input(grad, index, lut, columns, layout=setting.layout)

    return Case(
        f"gradient of the input, {tokens} token(s)",
        len(sketches),
        ours,
        lambda n: grad @ dense[n],
        lambda: (
            ours(0),
            plain.grad_input(grad.float(), _planes(first, setting), first.lut.float(), columns),
        ),
        first.nbytes + moved,
        dense[0].nbytes + moved,
        2 * tokens * rows * columns,
    )


def grad_lut(sketches: list[Sketch], dense: list[Any], tokens: int, setting: Setting) -> Case:
    """The gradient of the LUT, against the dense gradient `grad.T @ x` that it replaces."""
    from sketchconv.kernels import plain
    from sketchconv.kernels.gpu import ops

    rows, columns = dense[0].shape
    first = sketches[0]
    grad, x = _random(setting, tokens, rows), _random(setting, tokens, columns)
    moved = grad.nbytes + x.nbytes

    def ours(n: int) -> Any:
        return ops.grad_lut(grad, x, sketches[n].index, sketches[n].lut, layout=setting.layout)

    return Case(
        f"gradient of the LUT, {tokens} token(s)",
        len(sketches),
        ours,
        lambda n: grad.T @ x,
        lambda: (
            ours(0),
            plain.grad_lut(grad.float(), x.float(), _planes(first, setting), first.lut),
        ),
        first.index.nbytes + 4 * first.lut.numel() + moved,
        dense[0].nbytes + moved,
        2 * tokens * rows * columns,
    )


def decoded(sketches: list[Sketch], dense: list[Any], setting: Setting) -> Case:
    """The dense weight, against a copy of it."""
    from sketchconv.kernels import plain
    from sketchconv.kernels.gpu import ops

    columns, first = dense[0].shape[1], sketches[0]

    def ours(n: int) -> Any:
        index, lut = sketches[n].index, sketches[n].lut
        return ops.decode(index, lut, columns, setting.dtype, layout=setting.layout)

    return Case(
        "decoding (against a copy)",
        len(sketches),
        ours,
        lambda n: dense[n].clone(),
        lambda: (
            ours(0),
            plain.decode(_planes(first, setting), first.lut, columns, setting.dtype),
        ),
        first.nbytes + dense[0].nbytes,
        2 * dense[0].nbytes,
        0,
    )


def looked_up(sketches: list[Sketch], dense: list[Any], tokens: int, setting: Setting) -> Case:
    """Embedding rows."""
    import torch
    from torch.nn.functional import embedding

    from sketchconv.kernels import plain
    from sketchconv.kernels.gpu import ops

    rows, columns = dense[0].shape
    first = sketches[0]
    ids = torch.randint(0, rows, (tokens,), device=setting.device)

    def ours(n: int) -> Any:
        index, lut = sketches[n].index, sketches[n].lut
        return ops.gather(ids, index, lut, columns, setting.dtype, layout=setting.layout)

    def expected() -> Any:
        index = _planes(first, setting)[ids]
        return plain.decode(index, first.lut[ids], columns, setting.dtype)

    written = tokens * columns * dense[0].element_size()
    return Case(
        f"look-up, {tokens} token(s)",
        len(sketches),
        ours,
        lambda n: embedding(ids, dense[n]),
        lambda: (ours(0), expected()),
        first.nbytes * tokens // rows + written,
        2 * written,
        0,
    )


def tasks(sketches: list[Sketch], dense: list[Any], tokens: int, setting: Setting) -> Case:
    """A batch whose tokens use the LUTs of different tasks, against one dense weight for all."""
    import torch
    from torch.nn.functional import linear

    from sketchconv.kernels import plain
    from sketchconv.kernels.gpu import ops

    rows, columns = dense[0].shape
    first, x = sketches[0], _random(setting, tokens, columns)
    luts = torch.stack([first.lut, first.lut.flip(0), -first.lut, first.lut / 2])
    chosen = torch.arange(tokens, device=setting.device) % len(luts)

    def ours(n: int) -> Any:
        return ops.multiply_tasks(x, sketches[n].index, luts, chosen, layout=setting.layout)

    def expected() -> Any:
        index = _planes(first, setting)
        each = [plain.multiply(x.float(), index, lut.float()) for lut in luts]
        return torch.stack([each[task][n] for n, task in enumerate(chosen.tolist())])

    moved = x.nbytes + tokens * rows * x.element_size()
    return Case(
        f"product, {tokens} token(s) of {len(luts)} tasks",
        len(sketches),
        ours,
        lambda n: linear(x, dense[n]),
        lambda: (ours(0), expected()),
        first.index.nbytes + luts.nbytes + moved,
        dense[0].nbytes + moved,
        2 * tokens * rows * columns,
    )


def whole_model(layers: int, setting: Setting) -> tuple[Callable[[], None], int]:
    """One token through all linear layers of LLaMA-2-7B, and the bytes that it must read."""
    from torch.nn.functional import linear

    from sketchconv.kernels.gpu import ops

    network = [Sketch.make(*shape, setting) for _ in range(layers) for shape in LINEARS]
    head = _random(setting, HEAD_ROWS, LINEARS[0][1])
    inputs = {columns: _random(setting, 1, columns) for _, columns in LINEARS}

    def token() -> None:
        for sketch in network:
            x = inputs[sketch.columns]
            ops.multiply(x, sketch.index, sketch.lut, layout=setting.layout)
        linear(inputs[head.shape[1]], head)

    return token, sum(sketch.nbytes for sketch in network) + head.nbytes


def dense_model(layers: int, setting: Setting) -> tuple[Callable[[], None], int]:
    """The same with dense weights."""
    from torch.nn.functional import linear

    network = [_random(setting, *shape) for _ in range(layers) for shape in LINEARS]
    network.append(_random(setting, HEAD_ROWS, LINEARS[0][1]))
    inputs = {columns: _random(setting, 1, columns) for _, columns in LINEARS}

    def token() -> None:
        for weight in network:
            linear(inputs[weight.shape[1]], weight)

    return token, sum(weight.nbytes for weight in network)
