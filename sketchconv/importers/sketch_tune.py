"""SketchTune's compressed base models (Zhang et al., 2025), which are published as pickles."""

from __future__ import annotations

from collections.abc import Sequence

from sketchconv.errors import SourceError
from sketchconv.importers.base import Checkpoint, ImportOptions, Weight
from sketchconv.importers.nibbles import nibble_weight


class SketchTune:
    """A table per group of a row; ``W[r, c] = grid[r, c // GS, codes[r, c]]`` in bfloat16.

    Layout followed: SketchTune's repository of June 2025 (commit 1cb2192), `tailor_utils.py` and
    its kernel: one pickle, a dict from module to (grid [out, G, 2^b] or [out, 2^b], codes uint8
    [out, G, in/G/2] or [out, in/2]), indices in nibbles, the even column in the high one. The
    pickle is read by an interpreter of our own (`importers.unpickle`) that runs nothing.

    The peer loads its base in bfloat16 and turns the grid to that dtype, so a grid in another one
    is rounded to bfloat16 here too. All other weights are those of the base.
    """

    name = "sketchtune"
    layout = "SketchTune, pickle of (grid, codes)"
    formula = "grid[row, group, code] in bfloat16"
    complete = False

    def matches(self, checkpoint: Checkpoint) -> bool:
        """Whether everything is named as a member of a pair."""
        names = checkpoint.store.infos
        return bool(names) and all(name.endswith((".0", ".1")) for name in names)

    def weights(self, checkpoint: Checkpoint, options: ImportOptions) -> Sequence[Weight]:
        """Every pair; see `importers.base.Importer`."""
        stems = sorted({name[:-2] for name in checkpoint.store.infos})
        for stem in stems:
            if not checkpoint.has(f"{stem}.0") or not checkpoint.has(f"{stem}.1"):
                raise SourceError(f"{checkpoint.id}: {stem}: expected a pair of grid and codes")
        floats = ("F32", "F16", "BF16")
        return [
            nibble_weight(checkpoint, stem, f"{stem}.0", f"{stem}.1", floats, "BF16")
            for stem in stems
        ]
