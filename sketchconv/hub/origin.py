"""The model on the Hub that a source was made from, for cards of what does not record it itself."""

from __future__ import annotations

from pathlib import Path

from sketchconv.hub.fetching import fetch
from sketchconv.hub.spec import parse_spec
from sketchconv.hub.words import hub_id
from sketchconv.summary import is_sketch


def origin_of(source: str, revision: str | None = None) -> str | None:
    """The hub id that a sketch records, or that a dense source on the Hub has; None if unknown.

    Args:
        source: a path or a hub id, as `convert` takes it; what is on the Hub is in the cache then.
        revision: branch, tag or commit on the Hub.

    Raises:
        SketchconvError: the source cannot be read.
    """
    from sketchconv.formats.reader import SktchModel

    path, spec = Path(source).expanduser(), parse_spec(source)
    if not path.exists():
        if spec is None:
            return None
        path = fetch(source, revision, dense=True)
        if not is_sketch(path):
            return spec.repo
    if not is_sketch(path):
        return None
    with SktchModel.open(path) as sketch:
        return hub_id(sketch.manifest.source.get("id"))
