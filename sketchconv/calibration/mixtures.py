"""Experts in calibration: those that a sample missed, passes within memory, tokens that match."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sketchconv.calibration.stages import Group, Stage
from sketchconv.runtime.experts import Experts

# Bytes of the sums of one pass; a mixture of many experts takes several passes over the tokens.
SUMS_BYTES = 1 << 30
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def with_siblings(stages: Sequence[Stage], unseen: Sequence[str]) -> tuple[list[Stage], list[str]]:
    """Give experts that the sample did not reach the groups that the others have.

    Returns:
        The stages with these groups, and the paths that are still in none.
    """
    left, found = set(unseen), []
    for stage in stages:
        groups = list(stage.groups)
        for number in sorted({n for path in left for n in _numbers(path)}, key=int):
            alike = Group(tuple(_numbered(p, number) for p in groups[0].linears), {})
            if left.issuperset(alike.linears):
                groups.append(alike)
                left.difference_update(alike.linears)
        found.append(Stage(tuple(groups)))
    return found, [path for path in unseen if path in left]


def _numbers(path: str) -> list[str]:
    return _NUMBER.findall(f".{path}.")[:1]


def _numbered(path: str, number: str) -> str:
    return _NUMBER.sub(number, f".{path}.", count=1)[1:-1]


def in_passes(
    stages: Sequence[Stage], shapes: Mapping[str, tuple[int, int]], limit: int = SUMS_BYTES
) -> list[Stage]:
    """Cut stages of many groups so that the sums of a pass fit in `limit` bytes, or are of one.

    Args:
        stages: see `find_stages`.
        shapes: ``[out, in]`` by path of a linear module.
        limit: of three square float32 matrices for each group.
    """
    found = []
    for stage in stages:
        columns = shapes[stage.groups[0].linears[0]][1]
        size = max(1, limit // (12 * columns**2))
        groups = stage.groups
        found += [Stage(groups[at : at + size]) for at in range(0, len(groups), size)]
    return found


def sums_of_experts(shapes: Mapping[str, tuple[int, int]]) -> int:
    """Bytes of the sums of all experts of a block; 0 without experts."""
    return sum(12 * shape[1] ** 2 for path, shape in shapes.items() if _numbers(path))


@contextmanager
def same_routes(leader: nn.Module, follower: nn.Module, stage: Stage) -> Iterator[None]:
    """Have one block route its tokens as another did just before, where a stage is of experts.

    What the dense and the compressed model give an expert can be compared only token by token,
    and their routers choose differently. Modules behind the experts of `follower` then see the
    wrong sums; no stage of experts looks at them.
    """
    routes: dict[str, Any] = {}
    handles = []

    def keep(path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            routes[path] = args[1] if len(args) > 1 else kwargs["top_k_index"]

        return hook

    def follow(path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            index: Tensor | None = routes.get(path)
            if index is None:
                return None
            if len(args) > 1:
                return (args[0], index, *args[2:]), kwargs
            return args, {**kwargs, "top_k_index": index}

        return hook

    first = stage.groups[0].linears[0]
    for path, module in leader.named_modules():
        if isinstance(module, Experts) and first.startswith(f"{path}."):
            other = follower.get_submodule(path)
            handles.append(module.register_forward_pre_hook(keep(path), with_kwargs=True))
            handles.append(other.register_forward_pre_hook(follow(path), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
