"""LeanQuant checkpoints (Zhang and Shrivastava, 2025): a table per row, indices in nibbles."""

from __future__ import annotations

from collections.abc import Sequence

from sketchconv.importers.base import Checkpoint, ImportOptions, Weight
from sketchconv.importers.nibbles import nibble_weight


class LeanQuant:
    """A row's values stand in its table, ``W[r, c] = quant_grid[r, codes[r, c]]``.

    Layout followed: LeanQuant's repository of March 2025 (commit bc8c8ee), `Sub4BitLinear` and its
    kernel: `quant_grid` float16 or bfloat16 [out, 2^b], b of 2 to 4, and `weight_codes` uint8
    [out, in/2], the even column in the high nibble. Other weights are in the same safetensors
    file; config and tokenizer are those of the base model.
    """

    name = "leanquant"
    layout = "LeanQuant, quant_grid weight_codes"
    formula = "quant_grid[row, code], in the dtype of the grid"
    complete = True

    def matches(self, checkpoint: Checkpoint) -> bool:
        """Whether there are codes by that name."""
        return bool(checkpoint.stems(".weight_codes"))

    def weights(self, checkpoint: Checkpoint, options: ImportOptions) -> Sequence[Weight]:
        """Every module with `weight_codes`; see `importers.base.Importer`."""
        found = {*checkpoint.stems(".weight_codes"), *checkpoint.stems(".quant_grid")}
        return [
            nibble_weight(
                checkpoint, stem, f"{stem}.quant_grid", f"{stem}.weight_codes", ("F16", "BF16"), ""
            )
            for stem in sorted(found)
        ]
