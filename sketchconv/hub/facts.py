"""What a model card says of a model, read from its manifest or header; this checks them too."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sketchconv.errors import HubError
from sketchconv.hub import words
from sketchconv.hub.contents import Model
from sketchconv.summary import summarise

_HUB: Final = "https://huggingface.co/"


@dataclass(frozen=True, slots=True)
class Facts:
    """One model in words.

    Args:
        model: what is sent.
        rows: name and value of each fact, for the table.
        base: hub id of the model that it came from, None if not known.
        relation: to the base: `quantized` or `adapter`.
        license: identifier, None if not known.
        task: pipeline tag, None if not known.
        tags: for the Hub's search.
    """

    model: Model
    rows: tuple[tuple[str, str], ...]
    base: str | None = None
    relation: str = "quantized"
    license: str | None = None
    task: str | None = None
    tags: tuple[str, ...] = ()


def facts_of(model: Model) -> Facts:
    """Open a model, which checks its header and document, and describe it.

    Raises:
        SketchconvError: the file breaks a rule of its format, or is cut off.
    """
    return {
        "bundle": _sketch,
        "folder": _sketch,
        "delta": _delta,
        "gguf": _gguf,
        "dense": _dense,
        "mlx": _mlx,
    }[model.kind](model)


def check_digests(models: Sequence[Model]) -> None:
    """Verify sketches and deltas in full; other formats record no digests.

    Raises:
        HubError: with the first finding; or there is nothing that can be verified.
    """
    from sketchconv.verify import verify

    recorded = [model for model in models if model.kind not in ("gguf", "dense", "mlx")]
    if not recorded:
        raise HubError(
            "GGUF files, dense and MLX folders record no digests: nothing can be verified"
        )
    for model in recorded:
        findings = verify(model.path).findings
        if findings:
            raise HubError(f"{model.path}: failed verification, nothing was sent: {findings[0]}")


def _sketch(model: Model) -> Facts:
    from sketchconv.formats.reader import SktchModel

    with SktchModel.open(model.path) as sketch:
        manifest, config = sketch.manifest, sketch.config()
        texts = [sketch.file(n) for n in sketch.files if n.startswith(("LICENSE", "LICENCE"))]
    summary = summarise(model.path)
    bits = Counter[int]()
    for record in manifest.sketches.values():
        bits[record.bits] += record.shape[0] * record.shape[1]
    source, usual = manifest.source, bits.most_common(1)
    rows = [
        ("Method", words.method(manifest)),
        ("Bits", words.shares(bits)),
        ("Groups per row", words.groups(manifest)),
        *words.figures(model, summary.parameters),
        ("Calibration data", words.calibration(manifest.recipe)),
        ("Made from", words.origin(source)),
        ("Made by", manifest.tool),
    ]
    return Facts(
        model,
        tuple(rows),
        base=words.hub_id(source.get("id")),
        license=next(filter(None, map(words.license_of, texts)), None),
        task=words.task_of(config, model),
        tags=("sketchconv", "sktch", *(f"{width}-bit" for width, _ in usual)),
    )


def _delta(model: Model) -> Facts:
    from sketchconv.deltas.summary import facts, info

    summary = info(model.path)
    base = summary.base
    shown = [
        (key[:1].upper() + key[1:], value)
        for key, value in facts(summary)
        if key not in ("base", "delta size")
    ]
    rows = [
        ("Kind", "delta: changed lookup tables of one base sketch, no model by itself"),
        *shown,
        ("Size", f"{model.nbytes:,} bytes"),
        ("Base made from", words.origin(base)),
    ]
    tags = ("sketchconv", "sktch", "adapter", "sketchconv-delta")
    return Facts(model, tuple(rows), words.hub_id(base.get("id")), "adapter", tags=tags)


def _gguf(model: Model) -> Facts:
    from sketchconv.sources.gguf_header import read_header

    values: dict[str, Any] = {}
    parameters: Counter[str] = Counter()
    for part in model.weights:
        if not isinstance(part.data, bytes):  # every part is checked for its end
            summary = summarise(part.data)
            for row in summary.rows:
                parameters[row.dtype] += row.parameters
            values = {**read_header(part.data).values, **values}
    total = sum(parameters.values())
    rows = [
        ("Method", "GGUF for llama.cpp"),
        ("Types", words.shares(parameters)),
        *words.figures(model, total),
        (
            "Made from",
            words.shown_name(values.get("sketchconv.source") or values.get("general.name")),
        ),
        ("Made by", str(values.get("general.quantized_by") or "unknown")),
    ]
    urls = (values.get("general.source.url"), values.get("general.base_model.0.repo_url"))
    ids = [words.hub_id(url[len(_HUB) :]) for url in urls if isinstance(url, str)]
    license_id = values.get("general.license")
    return Facts(
        model,
        tuple(rows),
        base=next((name for name in ids if name), None),
        license=license_id if isinstance(license_id, str) else None,
        task="text-generation",
        tags=("sketchconv", "gguf"),
    )


def _dense(model: Model) -> Facts:
    from sketchconv.export.metadata import read_card

    summary, config = summarise(model.path), _config(model)
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method is not None:
        raise HubError(f"{model.path}: quantized by {method!r}, not a model that was made here")
    types: Counter[str] = Counter()
    for row in summary.rows:
        types[row.dtype] += row.parameters
    rows = [
        ("Method", "dense safetensors, decoded"),
        ("Types", words.shares(types)),
        *words.figures(model, summary.parameters),
    ]
    card = read_card(model.path)
    found = card.get("license")
    return Facts(
        model,
        tuple(rows),
        base=words.hub_id(card.get("base_model")),
        license=found if isinstance(found, str) else None,
        task=words.task_of(config, model),
        tags=("sketchconv",),
    )


def _mlx(model: Model) -> Facts:
    """An MLX folder: each module's words, scales and biases are one weight."""
    config, rows = _config(model), summarise(model.path).rows
    usual = config["quantization"]
    scales = {r.name.removesuffix(".scales"): r for r in rows if r.name.endswith(".scales")}
    types: Counter[str] = Counter()
    for row in rows:
        stem, _, leaf = row.name.rpartition(".")
        if stem not in scales or leaf not in ("weight", "scales", "biases"):
            types[row.dtype] += row.parameters
        elif leaf == "weight":
            own = usual.get(stem) or usual
            count = scales[stem].parameters * int(own["group_size"])
            types[f"{own['bits']} bits in groups of {own['group_size']}"] += count
    return Facts(
        model,
        (
            ("Method", "MLX, affine mode: the weights of a sketch, to the last bit"),
            ("Types", words.shares(types)),
            *words.figures(model, sum(types.values())),
        ),
        task=words.task_of(config, model),
        tags=("mlx", "sketchconv", f"{usual['bits']}-bit"),
    )


def _config(model: Model) -> dict[str, Any]:
    raw = next((file.data for file in model.others if file.name == "config.json"), b"{}")
    config = json.loads(raw) if isinstance(raw, bytes) else {}
    return config if isinstance(config, dict) else {}
