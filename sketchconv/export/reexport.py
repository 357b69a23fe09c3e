"""A GGUF file as the content of another: what is not asked to change passes through untouched."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sketchconv.errors import PlanError
from sketchconv.export.content import GgufContent
from sketchconv.export.metadata import provenance_keys, type_keys
from sketchconv.export.plan import ExportPlan, ExportStep
from sketchconv.export.planner import choose_type, is_matrix
from sketchconv.export.recipe import AUTO, ExportRecipe
from sketchconv.export.tasks import rows_digest
from sketchconv.formats import gguf_values as v
from sketchconv.formats.gguf_layout import GgufInfo
from sketchconv.sources.base import Source
from sketchconv.sources.gguf import GgufSource
from sketchconv.sources.gguf_blocks import GgufBlocks
from sketchconv.sources.gguf_parts import SPLIT_KEYS


class BlockRows:
    """Rows of a GGUF file, dequantized, or as they are."""

    format = "gguf"

    def __init__(self, source: GgufBlocks) -> None:
        self.source = source
        self.id, self.nbytes, self.paths = source.id, source.nbytes, source.paths

    def rows(self, step: ExportStep, begin: int, end: int) -> npt.NDArray[np.float32]:
        """Rows as float32. Raises SourceError for a type that cannot be dequantized."""
        return self.source.float32(step.name, self.source.rows(step.name, begin, end))

    def verbatim(self, step: ExportStep, begin: int, end: int) -> bytes:
        """Rows as the file has them."""
        return self.source.rows(step.name, begin, end)

    def digest(self, step: ExportStep, *others: bytes) -> str:
        """SHA-256 of the file's blocks of a tensor."""
        info, read = self.source.tensors[step.name], partial(self.source.rows, step.name)
        return rows_digest(read, math.prod(info.shape[:-1]), info.row_bytes, *others)

    @contextmanager
    def model(self, steps: Iterable[ExportStep]) -> Iterator[tuple[Source, Mapping[str, str]]]:
        """The same file under Hugging Face's names, opened once more.

        Raises:
            ArchitectureError: the file is of an architecture that is not read as a model.
        """
        with GgufSource(self.source.path) as source:
            names = {stored: name for name, stored in source.stored_names.items()}
            yield source, {step.name: names[step.name] for step in steps if step.name in names}

    def close(self) -> None:
        """Close the file."""
        self.source.close()


def from_gguf(path: Path, recipe: ExportRecipe) -> tuple[BlockRows, GgufContent]:
    """Plan a re-export: tensors keep their blocks unless the recipe asks for another type.

    Raises:
        SourceError: the file is broken.
        PlanError: a pattern names nothing, or a type cannot be changed.
    """
    source = GgufBlocks(path)
    try:
        plan = _plan(source, recipe)
        values = _values(source, recipe, plan)
    except BaseException:
        source.close()
        raise
    return BlockRows(source), GgufContent(plan, values, "as it is", source.alignment)


def _plan(source: GgufBlocks, recipe: ExportRecipe) -> ExportPlan:
    recipe = recipe.spelled_out(source.tensors)
    steps = tuple(_step(source, info, recipe) for info in source.tensors.values())
    for choice in recipe.choices:
        if not any(choice.names(s.name) and is_matrix(s.name, s.info.shape) for s in steps):
            raise PlanError(f"pattern {choice.pattern!r} names no matrix of {source.id}")
    return ExportPlan(steps, {}, ())


def _step(source: GgufBlocks, info: GgufInfo, recipe: ExportRecipe) -> ExportStep:
    name, shape = info.name, info.shape
    untouched = recipe.type == AUTO and recipe.choice_for(name) is None
    if untouched or not is_matrix(name, shape):
        return ExportStep(info, "as it is", name, verbatim=True)
    encoder, reason = choose_type(name, shape, info.type.name, recipe)
    if encoder.type == info.type:
        return ExportStep(info, "as it is", name, verbatim=True)
    # A type that cannot be read is found here, before any work, by trying its first row.
    source.float32(name, source.rows(name, 0, 1))
    return ExportStep(GgufInfo(name, shape, encoder.type), reason, name)


def _values(source: GgufBlocks, recipe: ExportRecipe, plan: ExportPlan) -> dict[str, bytes]:
    values = {key: source.value_bytes(key) for key in source.header.values if key not in SPLIT_KEYS}
    if recipe.name is not None:
        values["general.name"] = v.string(recipe.name)
    if recipe.tokenizer_pre is not None:
        values["tokenizer.ggml.pre"] = v.string(recipe.tokenizer_pre)
    if all(step.verbatim for step in plan.steps):
        return values
    values.update(type_keys(plan.main_type()))
    values.update(provenance_keys(source.id, source.format, plan.types(), {}))
    return values
