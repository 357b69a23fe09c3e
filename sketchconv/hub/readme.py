"""The model card of a push: what the models say, merged into the card that is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sketchconv.errors import HubError

if TYPE_CHECKING:
    from sketchconv.hub.facts import Facts
    from sketchconv.hub.outgoing import Outgoing
    from sketchconv.hub.remote import Remote, RemoteState

_WEIGHTS: Final = (".sktch", ".safetensors", ".gguf")


@dataclass(frozen=True, slots=True)
class CardOptions:
    """What the model card says beyond the models themselves.

    Args:
        write: whether to write a card at all.
        scores: what `sketchconv eval --json` printed, as a value; None without.
        base_model: hub id of the base, in place of what the models say.
        license: identifier, in place of what is inherited from the base.
    """

    write: bool = True
    scores: Mapping[str, Any] | None = None
    base_model: str | None = None
    license: str | None = None


def make_card(
    remote: Remote,
    state: RemoteState,
    models: Sequence[Facts],
    digests: Mapping[str, str],
    options: CardOptions,
) -> Outgoing:
    """The card to send: ours merged into the one that the repository has.

    Args:
        remote: where to; asked for the card that is there.
        state: of the repository, whose other weight files are listed, too.
        models: everything that is sent.
        digests: SHA-256 of every file of them.
        options: what was asked for.

    Raises:
        HubError: the card that is there cannot be merged, or ours would hold a secret.
    """
    from sketchconv.hub import card_file, metadata
    from sketchconv.hub.card import EVALUATION, card_sections
    from sketchconv.hub.outgoing import Outgoing

    base = metadata.base_of(models, options.base_model)
    values = metadata.card_metadata(
        models,
        base_model=options.base_model,
        license=options.license,
        base_card=metadata.base_card(base) if base else None,
    )
    sums = _checksums(state, models, digests)
    sections = card_sections(remote.repo, models, sums, options.scores)
    _refuse_secrets([*sections.values(), str(values)], remote.token)
    old = remote.read(card_file.NAME, state)
    kept = frozenset({*state.files, EVALUATION, "model", "adapter"})
    title = remote.repo.split("/")[1]
    return Outgoing.of_bytes(
        card_file.NAME, card_file.merge_card(old, title, values, sections, kept)
    )


def _checksums(
    state: RemoteState, models: Sequence[Facts], digests: Mapping[str, str]
) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of every weight file that the repository will hold, sorted by name."""
    sums = {n: (f.size, f.sha256) for n, f in state.files.items() if f.sha256}
    sums |= {f.name: (f.size, digests[f.name]) for m in models for f in m.model.files}
    return {name: value for name, value in sorted(sums.items()) if name.endswith(_WEIGHTS)}


def _refuse_secrets(texts: Sequence[str], token: str | None) -> None:
    from sketchconv.hub.secrets import find_secret

    for text in texts:
        found = find_secret(text.encode(), token)
        if found is not None:
            raise HubError(f"the model card would hold {found} of its text; nothing was sent")
