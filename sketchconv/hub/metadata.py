"""The metadata of a model card: what the Hub shows, filters and links by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from sketchconv.errors import HubError
from sketchconv.hub.facts import Facts
from sketchconv.hub.words import license_of

# What a card inherits from that of its base.
_INHERITED: Final = ("license", "license_name", "license_link", "language")


def card_metadata(
    models: Sequence[Facts],
    *,
    base_model: str | None = None,
    license: str | None = None,
    base_card: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The YAML keys of a card; what is not known is left out.

    `library_name` is what the Hub's "use this model" button names: `transformers` where plain
    `from_pretrained` opens the repository (a folder; `import sketchconv` registers its method),
    `mlx` for a folder of mlx-lm, `sketchconv` where only our loader does (a `.sktch` file, a
    delta), and none for GGUF files alone, which the Hub recognises.

    Args:
        models: everything that is sent.
        base_model: hub id in place of what the models say.
        license: identifier in place of what is inherited.
        base_card: metadata of the base's card, if it could be read.
    """
    kinds = {facts.model.kind for facts in models}
    values: dict[str, Any] = _license(models, license, base_card or {})
    bases = [base_model] if base_model else sorted({f.base for f in models if f.base})
    if bases:
        values["base_model"] = bases[0] if len(bases) == 1 else bases
        adapters = {f.relation for f in models} == {"adapter"}
        values["base_model_relation"] = "adapter" if adapters else "quantized"
    if kinds & {"folder", "dense"}:
        values["library_name"] = "transformers"
    elif "mlx" in kinds:
        values["library_name"] = "mlx"
    elif kinds - {"gguf"}:
        values["library_name"] = "sketchconv"
    task = next((f.task for f in models if f.task), None) or (base_card or {}).get("pipeline_tag")
    if isinstance(task, str):
        values["pipeline_tag"] = task
    values["tags"] = list(dict.fromkeys(tag for f in models for tag in f.tags))
    return values


def base_of(models: Sequence[Facts], base_model: str | None) -> str | None:
    """The one hub id whose card to ask; None if there is none, or several."""
    bases = {base_model} if base_model else {f.base for f in models if f.base}
    return next(iter(bases)) if len(bases) == 1 else None


def base_card(repo: str) -> dict[str, Any] | None:
    """The metadata of a base's card on the Hub; None where it cannot be read.

    A licence is worth one request, but no failure: the push goes on without.
    """
    from huggingface_hub import HfApi

    from sketchconv.sources.hub import explained

    try:
        with explained(repo, None):
            info = HfApi().model_info(repo, timeout=10)
    except HubError:
        return None
    card: Any = info.card_data
    return {"pipeline_tag": info.pipeline_tag, **(card.to_dict() if card is not None else {})}


def _license(
    models: Sequence[Facts], license: str | None, card: Mapping[str, Any]
) -> dict[str, Any]:
    if license is not None:
        return {"license": license}
    inherited = {key: card[key] for key in _INHERITED if card.get(key)}
    if "license" in inherited:
        return inherited
    named = {facts.license for facts in models if facts.license}
    if len(named) == 1:
        return {**inherited, "license": named.pop()}
    for facts in models:
        for file in facts.model.others:
            if file.name.upper().startswith(("LICENSE", "LICENCE")):
                return {**inherited, **_of_text(file.name, file.data)}
    return inherited


def _of_text(name: str, data: Any) -> dict[str, str]:
    known = license_of(data) if isinstance(data, bytes) else None
    if known is not None:
        return {"license": known}
    return {"license": "other", "license_name": "see-file", "license_link": name}
