"""The search of a kind as a whole: scales, then codes, in NumPy and compiled."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import intrinsic
from numpy.typing import NDArray

from sketchconv.kernels import vectors as v
from sketchconv.kernels.ggml import affine, scales
from sketchconv.kernels.ggml.arrays import Arrays
from sketchconv.kernels.ggml.lanes import BYTES, LANES, WORDS, Lanes, transpose
from sketchconv.kernels.ggml.plans import GRIDS, PLANS, AffinePlan, Plan

F32 = NDArray[np.float32]


def find_scales(o: Any, plan: Plan) -> tuple[Any, Any, tuple[Any, ...]]:
    """``(step, base, fields)``: what levels are multiplied with and added to, and what is stored.

    The fields are step and base, or whole scales and units: at most four of them.
    """
    if isinstance(plan, AffinePlan):
        found = affine.scaled(o, plan) if plan.units else affine.single(o, plan)
        return found[0], found[1], found[2:]
    found = scales.scaled(o, plan) if plan.units else scales.single(o, plan)
    return found[0], o.constant(0.0), found[1:]


def code_of(o: Any, plan: Plan, i: Any, inverse: Any, base: Any) -> Any:
    """Codes of element i of every sub-block."""
    return plan.levels.code(o, plan.levels.nearest(o, (o.x(i) - base) * inverse))


def search_arrays(x: F32, weights: F32, plan: Plan) -> tuple[NDArray[np.int8], list[F32]]:
    """Codes int8 ``[size, sub-blocks]`` and fields of float32 `x` of that shape: the reference."""
    o = Arrays(x, weights, plan.group)
    step, base, fields = find_scales(o, plan)
    inverse = o.reciprocal(step)
    codes = [code_of(o, plan, i, inverse, base) for i in range(o.size)]
    return np.stack(codes).astype(np.int8), list(fields)


def _build(context: Any, builder: Any, signature: Any, args: Any, plan: Plan, size: Any) -> None:
    """Build the search of `plan` on the arrays of a tile."""
    source, masses, target, stored = v.data_of(context, builder, signature, args)[:4]
    o = Lanes(builder, source, masses, size, plan.group)
    step, base, found = find_scales(o, plan)
    for place, field in enumerate(found):
        v.store(builder, field.value, stored, v.I64(place * LANES))
    inverse = o.reciprocal(step)

    count = v.I64(size) if isinstance(size, int) else size

    def store(first: Any, _none: list[Any]) -> list[Any]:
        rows = []
        for k in range(LANES):
            code = code_of(o, plan, builder.add(first, v.I64(k)), inverse, base)
            rows.append(builder.trunc(builder.fptosi(code.value, WORDS), BYTES))
        for lane, row in enumerate(transpose(builder, rows)):
            place = builder.add(builder.mul(v.I64(lane), count), first)
            v.store(builder, row, target, place)
        return []

    v.blocks(builder, count, LANES, [], store)


def _search(typing: Any, x: Any, weights: Any, codes: Any, fields: Any, kind: Any) -> Any:
    """Fill `codes` uint8 ``[16, size]`` and `fields` float32 ``[4, 16]`` from `x` ``[size, 16]``.

    `kind` is the literal name of the kind.
    """
    plan = PLANS[kind.literal_value]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _build(context, builder, signature, args, plan, plan.size)
        return context.get_dummy_value()

    return v.types.void(x, weights, codes, fields, kind), codegen


def _search_grid(
    typing: Any, x: Any, weights: Any, codes: Any, fields: Any, size: Any, grid: Any
) -> Any:
    """The same for the literal name of a grid, and sub-blocks of any `size`."""
    plan = GRIDS[grid.literal_value]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _build(context, builder, signature, args, plan, args[4])
        return context.get_dummy_value()

    return v.types.void(x, weights, codes, fields, v.types.int64, grid), codegen


search: Any = intrinsic(prefer_literal=True)(_search)
search_grid: Any = intrinsic(prefer_literal=True)(_search_grid)
