"""Match a checkpoint's tensor names with a model's, by the rules that transformers loads by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sketchconv.errors import ArchitectureError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Names:
    """The outcome of matching.

    Attributes:
        plain: checkpoint name -> the model's name, for tensors that are loaded as they are.
        converted: checkpoint names that transformers merges, splits or fuses while loading.
        extra: checkpoint names that the model does not have.
        present: the model's names that the checkpoint provides in either way.
    """

    plain: Mapping[str, str]
    converted: frozenset[str]
    extra: tuple[str, ...]
    present: frozenset[str]


def match_names(model: PreTrainedModel, names: Iterable[str]) -> Names:
    """Match every checkpoint name.

    Old names (`LayerNorm.gamma`), a base model's prefix that is there or not, and the renamings
    that transformers keeps for some architectures are followed.

    Raises:
        ArchitectureError: two tensors of the checkpoint are the same weight of the model.
    """
    expected = model.state_dict()
    rename = _Renamer(model, expected)
    plain: dict[str, str] = {}
    seen: dict[str, str] = {}
    converted: set[str] = set()
    present: set[str] = set()
    extra = []
    for name in names:
        target, results = rename(name)
        if target is None and not results:
            extra.append(name)
        elif target is None:
            converted.add(name)
            present.update(results)
        elif target in seen:
            raise ArchitectureError(f"{name!r} and {seen[target]!r} are the same weight {target!r}")
        else:
            plain[name] = target
            seen[target] = name
            present.add(target)
    return Names(plain, frozenset(converted), tuple(extra), frozenset(present))


class _Renamer:
    """Maps one checkpoint name to the model's, with transformers' own tables."""

    def __init__(self, model: PreTrainedModel, expected: dict[str, Any]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        rules = get_model_conversion_mapping(model)
        self.renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self.converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self.expected = expected
        self.prefix = model.base_model_prefix

    def __call__(self, name: str) -> tuple[str | None, list[str]]:
        """(the model's name, []), or (None, names it is converted to), or (None, [])."""
        from transformers.core_model_loading import rename_source_key

        target, pattern = rename_source_key(
            name, self.renamings, self.converters, self.prefix, self.expected
        )
        if target not in self.expected and name in self.expected:
            return name, []
        if target not in self.expected and pattern is not None:
            # What it would be merged into has been taken apart (`unfold`).
            target, pattern = rename_source_key(
                name, self.renamings, [], self.prefix, self.expected
            )
        if target not in self.expected:
            return None, []
        if pattern is None:
            return target, []
        return None, self._results(target, pattern)

    def _results(self, first: str, pattern: str) -> list[str]:
        """Every weight that a converter makes, given the name of the first."""
        for converter in self.converters:
            if pattern in converter.source_patterns:
                targets = converter.target_patterns
                return [first.replace(targets[0], target, 1) for target in targets]
        return [first]
