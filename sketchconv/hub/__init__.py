"""The Hugging Face Hub: `fetch` what a hub id names, `push` what was made here."""

from sketchconv.hub.fetching import fetch
from sketchconv.hub.pushing import check_target, push
from sketchconv.hub.readme import CardOptions

__all__ = ["CardOptions", "check_target", "fetch", "push"]
