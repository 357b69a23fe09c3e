"""What an output says of itself, known before a weight is read: document, config, sizes."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sketchconv.errors import SourceError
from sketchconv.plan import Plan
from sketchconv.ready import ready_origin
from sketchconv.recipe import Recipe, SketchSpec

if TYPE_CHECKING:
    from sketchconv.calibration.options import Calibration
    from sketchconv.formats.writer import Draft
    from sketchconv.moments import Moments
    from sketchconv.sources.base import Source

_TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def make_draft(
    source: Source,
    plan: Plan,
    recipe: Recipe,
    moments: Moments,
    calibration: Calibration | None,
) -> Draft:
    """All that the document says, but for digests and errors."""
    from sketchconv import __version__
    from sketchconv.formats.writer import Draft

    own = {"import": ready_origin(source), "exclude": list(recipe.exclude)}
    fitted = {
        **recipe.to_json(),
        "weighting": recipe.weighting_for(calibrated=calibration is not None),
    }
    return Draft(
        sketches=plan.sketches,
        plain=plan.plain,
        aliases=plan.aliases,
        recipe={
            **(own if plan.ready else fitted),
            "column_weights": moments.description,
            **({} if calibration is None else {"calibration": _described(calibration, plan)}),
            "dropped": sorted(step.name for step in plan.steps if step.action == "drop"),
        },
        source={
            "id": _printable(source.id),
            "revision": source.revision,
            "format": source.format,
            **plan.forms.to_json(),
        },
        tool=f"sketchconv {__version__}",
    )


def _described(calibration: Calibration, plan: Plan) -> dict[str, Any]:
    values = calibration.to_json()
    values["texts"] = [_printable(text) for text in values["texts"]]
    return {**values, "recover": calibration.recovery_tokens(plan.steps)}


def _printable(text: str) -> str:
    """A name from the file system without the surrogates that stand for undecodable bytes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def with_dtype(config: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """The config with the dtype of most parameters, where it names none.

    Without it transformers would take the dtype of the first tensor, which may be a LUT.
    """
    if config.get("dtype") or config.get("torch_dtype"):
        return dict(config)
    counts: Counter[str] = Counter()
    for info in source.infos.values():
        counts[info.dtype] += math.prod(info.shape)
    floats = [(counts[dtype], name) for dtype, name in _TORCH_DTYPES.items() if counts[dtype]]
    return {**config, "dtype": max(floats)[1]} if floats else dict(config)


def with_config(
    files: Mapping[str, bytes], config: Mapping[str, Any], spec: SketchSpec
) -> dict[str, bytes]:
    """The source's files with a config.json that names our quantizer."""
    if "config.json" not in files:
        raise SourceError("the source has no config.json, so no one could load the result")
    quantization = {
        "quant_method": "sktch",
        "format": "1.0",
        "bits": spec.bits,
        "groups": None if spec.group_size is not None else spec.groups,
        "group_size": spec.group_size,
    }
    if spec.grid != "free":
        size = spec.group_size or 32
        quantization.update(format="1.1", grid=spec.grid, groups=None, group_size=size)
    merged = {**config, "quantization_config": quantization}
    text = json.dumps(merged, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return {**files, "config.json": text.encode("utf-8")}


def output_sizes(
    output: Path, draft: Draft, files: Mapping[str, bytes], max_shard_size: int
) -> dict[str, int]:
    """Exact bytes on disk of every file of the output."""
    from sketchconv.formats.writer import bundle_size, folder_sizes

    if output.suffix == ".sktch":
        return {output.name: bundle_size(draft, files)}
    return dict(folder_sizes(draft, files, max_shard_size))
