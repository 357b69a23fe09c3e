"""How many parameters a fine-tune's update needs, as a low-rank matrix and as a sketch.

The figure that the paper on sketch fine-tuning (SketchTune, ICML 2025) opens its case with, for a
user's own pair of models. For a weight ``[m, n]`` with the update ``D = tuned - dense`` and its
singular values ``s_1 >= s_2 >= ...``:

* rank needed for a share p of the energy: the least r with
  ``s_1^2 + ... + s_r^2 >= p |D|^2``;
* error of the best update of rank r (Eckart and Young):
  ``|D - D_r|^2 / |D|^2 = 1 - (s_1^2 + ... + s_r^2) / |D|^2``;
* error of the best sketch update on index maps with G groups of b bits:
  ``|D - S x|^2 / |D|^2``, where x is the mean of D over the columns of each entry. (Least squares
  with every column alike, whatever the maps were made by.)

A sketch of G groups has ``m G 2^b`` parameters, an update of rank r ``r (m + n)``. They are
compared at ``r = ceil(m G 2^b / (m + n))``, at most ``min(m, n)``: the low-rank side never has
fewer parameters. Errors of all layers together are ``sum |D - ...|^2 / sum |D|^2``, each layer at
its own rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sketchconv.projection.low_rank import rank_for

SHARES = (0.8, 0.9, 0.95)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A sketch update and a low-rank update of as many parameters.

    Attributes:
        bits, groups: of the sketch; 0 in a total over sketches that differ.
        parameters: of the sketch: its LUT entries.
        rank: of the other update.
        low_rank_parameters: of the other update, at least as many unless its rank is full.
        sketch, low_rank: relative errors, ``|D - update|^2 / |D|^2``.
    """

    bits: int
    groups: int
    parameters: int
    rank: int
    low_rank_parameters: int
    sketch: float
    low_rank: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "bits": self.bits,
            "groups": self.groups,
            "parameters": self.parameters,
            "rank": self.rank,
            "low_rank_parameters": self.low_rank_parameters,
            "sketch_error": self.sketch,
            "low_rank_error": self.low_rank,
        }


@dataclass(frozen=True, slots=True)
class LayerAnalysis:
    """The update of one weight.

    Attributes:
        name: of the weight.
        shape: ``(out, in)``.
        energy: ``|D|^2``.
        relative: ``|D| / |dense|``; None for a weight of zeros.
        ranks: share of the energy -> rank needed.
        comparisons: by what the index maps are, as "G = 4"; empty for an update of zeros.
    """

    name: str
    shape: tuple[int, int]
    energy: float
    relative: float | None
    ranks: Mapping[float, int]
    comparisons: Mapping[str, Comparison] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "full_rank": min(self.shape),
            "relative_change": self.relative,
            "ranks": {f"{share:g}": rank for share, rank in self.ranks.items()},
            "comparisons": {label: c.to_json() for label, c in self.comparisons.items()},
        }


@dataclass(frozen=True, slots=True)
class Analysis:
    """The update of a whole model.

    Attributes:
        base, tuned: names of the two models.
        start: what the update is measured from, in words.
        layers: of the weights that were compared.
        dense: names of matrices that were not, since they are not sketched.
    """

    base: str
    tuned: str
    start: str
    layers: tuple[LayerAnalysis, ...]
    dense: tuple[str, ...] = field(default=())

    @property
    def totals(self) -> dict[str, Comparison]:
        """For each kind of index maps all layers together; the rank is their mean."""
        labels = dict.fromkeys(label for layer in self.layers for label in layer.comparisons)
        return {label: self._total(label) for label in labels}

    def _total(self, label: str) -> Comparison:
        layers = [layer for layer in self.layers if label in layer.comparisons]
        energy = math.fsum(layer.energy for layer in layers)
        found = [layer.comparisons[label] for layer in layers]
        weighed = list(zip(layers, found, strict=True))
        return Comparison(
            bits=_common(c.bits for c in found),
            groups=_common(c.groups for c in found),
            parameters=sum(c.parameters for c in found),
            rank=round(sum(c.rank for c in found) / len(found)),
            low_rank_parameters=sum(c.low_rank_parameters for c in found),
            sketch=math.fsum(x.energy * c.sketch for x, c in weighed) / energy,
            low_rank=math.fsum(x.energy * c.low_rank for x, c in weighed) / energy,
        )

    @property
    def mean_ranks(self) -> dict[float, float]:
        """Share of the energy -> mean over the changed layers of rank needed / full rank."""
        changed = [layer for layer in self.layers if layer.energy > 0]
        return {
            share: sum(x.ranks[share] / min(x.shape) for x in changed) / len(changed)
            for share in (SHARES if changed else ())
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {
            "base": self.base,
            "tuned": self.tuned,
            "update": self.start,
            "mean_rank_share": {f"{share:g}": rank for share, rank in self.mean_ranks.items()},
            "totals": {label: total.to_json() for label, total in self.totals.items()},
            "layers": [layer.to_json() for layer in self.layers],
            "not_compared": list(self.dense),
        }


def compare(
    shape: tuple[int, int], bits: int, groups: int, energies: Tensor, left: float
) -> Comparison:
    """Both updates of one weight at as many parameters.

    Args:
        shape: ``(out, in)``.
        bits, groups: of the sketch.
        energies: squared singular values of the update, float64, descending; not all 0.
        left: ``|D - S x|^2``, what the sketch update leaves.
    """
    rows, columns = shape
    parameters = rows * groups << bits
    rank = min(-(-parameters // (rows + columns)), rows, columns)
    total = float(energies.sum())
    return Comparison(
        bits,
        groups,
        parameters,
        rank,
        rank * (rows + columns),
        left / total,
        float(energies[rank:].sum()) / total,
    )


def ranks_of(energies: Tensor, shares: Sequence[float] = SHARES) -> dict[float, int]:
    """Rank needed for each share of the energy."""
    return {share: rank_for(energies, share) for share in shares}


def _common(values: Iterable[int]) -> int:
    """The one value that all have; 0 where they differ."""
    found = set(values)
    return found.pop() if len(found) == 1 else 0
