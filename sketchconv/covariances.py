"""Hessians without any data: second moments of whole inputs, propagated through the network.

`moments.py` follows the mean square of every channel; this module follows how channels vary
together, E[x x'], by the same steps. So each layer's error can be compensated from column to
column as in calibrated compression (`calibration/solve.py`), although no token was ever run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sketchconv.calibration.factors import Factors
from sketchconv.calibration.spans import one_thread
from sketchconv.calibration.statistics import Statistics
from sketchconv.errors import PlanError
from sketchconv.kernels.threads import available_threads
from sketchconv.llama_layout import Layout, Place
from sketchconv.moments import ATTENTION_SHARE, Rows, Vector, silu_second_moment

if TYPE_CHECKING:
    from torch import Tensor

    from sketchconv.formats.tensors import TensorInfo

TILE = 256  # rows of a product that one thread computes, whatever the number of threads
BLOCK = 4096  # embeddings whose products are summed at once
_STAGES = {"q": "norm_1", "k": "norm_1", "v": "norm_1", "gate": "norm_2", "up": "norm_2"}
_NORMS = ("norm_1", "norm_2", "norm")
_MULTIPLIED = ("v", "o", "gate", "up", "down")


class PropagatedCovariances:
    """Second moments E[x x'] of the inputs of a llama-like network.

    With S the second moments ``[h, h]`` of the residual stream (at first those of the embeddings,
    all alike), N(S) = diag(gain) S diag(gain) / (mean(diag S) + eps):

    - q, k, v, gate, up, head: N(S), as RMSNorm's output;
    - o: the blocks of one head of ``W_v N(S) W_v'``, once for each query head that shares the
      value head; S += 0.3 W_o (that) W_o';
    - down: E[silu(s)^2] E[u^2] on the diagonal, with s normal of variance diag(W_gate N(S)
      W_gate'); S += W_down (that) W_down'. Its columns are weighed, and nothing is compensated.

    Biases add their products. Sums run in tiles of fixed size, each on one thread.
    """

    description = "propagated covariances"

    def __init__(self, layout: Layout, infos: Mapping[str, TensorInfo]) -> None:
        self.order = layout.order
        self._threads: int | None = None
        self._layout = layout
        self._shapes = {name: infos[name].shape for name in layout.order}
        self._stream = torch.zeros(layout.hidden, layout.hidden)
        self._weights: dict[str, Tensor] = {}
        self._biases: dict[str, Tensor] = {}
        self._gains: dict[str, Tensor] = {}
        self._variances: dict[str, Vector] = {}
        self._heads: Tensor | None = None
        self._factors: dict[str, Factors] = {}
        self._seen: dict[str, int] = {}

    def needs(self, name: str) -> bool:
        """Everything up to the last layer; not q and k, whose outputs change no second moment."""
        place = self._layout.places.get(name)
        return place is not None and place.role not in ("q", "k", "head")

    def column_weights(self, name: str) -> Vector | None:
        """Mean square of the input's columns, scaled to mean 1; None outside the layers."""
        place = self._layout.places.get(name)
        if place is None or place.bias or place.role in (*_NORMS, "embedding"):
            return None
        if place.role == "down":
            moments = self._down_input(place)
        else:
            moments = self._hessian(place).diagonal().double().numpy()
        mean = float(moments.mean())
        return moments / mean if mean > 0 and np.isfinite(mean) else None

    def factors(self, name: str) -> Factors | None:
        """Second moments of the inputs of a linear module, to compensate with; None for others.

        Raises:
            PlanError: a tensor that they depend on was not shown.
        """
        place = self._layout.places.get(name)
        if place is None or place.bias or place.role in (*_NORMS, "embedding", "head", "down"):
            return None
        key = _STAGES.get(place.role, place.role)
        if key not in self._factors:
            self._factors[key] = Factors(Statistics(self._hessian(place), 1))
        return self._factors[key]

    def observe(self, name: str, begin: int, rows: Rows, threads: int | None = None) -> None:
        """Propagate through these rows; a weight is kept until it is whole, an embedding is not."""
        place = self._layout.places[name]
        shape = self._shapes[name]
        self._threads = threads
        if begin == 0 and place.role in _NORMS:
            self._forget()
        if begin == 0:
            size = (min(BLOCK, shape[0]), *shape[1:]) if place.role == "embedding" else shape
            self._weights[name] = torch.empty(size)
        self._seen[name] = begin + len(rows)
        if place.role == "embedding":
            self._embed(name, begin, torch.from_numpy(rows))
            return
        self._weights[name][begin : begin + len(rows)] = torch.from_numpy(rows)
        if self._seen[name] == shape[0]:
            self._finish(place, self._weights.pop(name))

    def _embed(self, name: str, begin: int, rows: Tensor) -> None:
        """Add embeddings in blocks that do not depend on how they arrive."""
        total, block = self._shapes[name][0], self._weights[name]
        while len(rows):
            at = begin % BLOCK
            part = rows[: min(BLOCK - at, len(rows))]
            block[at : at + len(part)] = part
            begin, rows = begin + len(part), rows[len(part) :]
            if begin % BLOCK == 0 or begin == total:
                whole = block[: at + len(part)].T.contiguous()
                self._stream += self._product(whole, whole)
        if begin == total:
            self._stream /= total
            del self._weights[name]

    def _finish(self, place: Place, weight: Tensor) -> None:
        """Take in a tensor that has been seen whole."""
        if place.bias:
            self._add_bias(place, weight)
        elif place.role in _NORMS:
            self._gains[place.role] = weight
        elif place.role == "v":
            hessian = self._hessian(place)
            self._heads = self._product(self._product(weight, hessian), weight)
        elif place.role == "o":
            moments = self._hessian(place)
            spread = self._product(self._product(weight, moments), weight)
            self._stream += ATTENTION_SHARE * spread
        elif place.role in ("gate", "up"):
            hessian = self._hessian(place)
            parts = [
                (self._product(rows, hessian).double() * rows).sum(1)
                for rows in torch.split(weight, BLOCK)  # float64 copies of no more than these
            ]
            self._variances[place.role] = torch.cat(parts).numpy()
        else:
            scaled = weight * torch.from_numpy(self._down_input(place)).float()
            self._stream += self._product(scaled, weight)

    def _add_bias(self, place: Place, bias: Tensor) -> None:
        if place.role == "v" and self._heads is not None:
            self._heads += torch.outer(bias, bias)
        elif place.role in ("gate", "up"):
            self._variances[place.role] += bias.double().square().numpy()
        elif place.role in ("o", "down"):
            self._stream += torch.outer(bias, bias)

    def _hessian(self, place: Place) -> Tensor:
        """E[x x'] of a module's input, float32 ``[in, in]``; not of `down`."""
        self._check_seen(place)
        if place.role == "o":
            return self._shared_heads()
        gain = self._gains["norm" if place.role == "head" else _STAGES[place.role]]
        scale = float(self._stream.diagonal().double().mean()) + self._layout.epsilon
        return self._stream * torch.outer(gain, gain) / scale

    def _shared_heads(self) -> Tensor:
        """Blocks of value heads on the diagonal, one for each query head; zeros between heads."""
        if self._heads is None:
            raise PlanError("the second moments for o need v, which was not read before it")
        size, share = self._layout.head_dim, self._layout.queries_per_value
        starts = range(0, len(self._heads), size)
        blocks = [self._heads[at : at + size, at : at + size] for at in starts]
        spread: Tensor = torch.block_diag(*(b for b in blocks for _ in range(share)))  # type: ignore[no-untyped-call]
        return spread

    def _down_input(self, place: Place) -> Vector:
        self._check_seen(place)
        return silu_second_moment(self._variances["gate"]) * self._variances["up"]

    def _forget(self) -> None:
        """Drop what only the modules before a norm depended on."""
        self._factors.clear()
        self._gains.clear()
        self._heads = None

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        """``left @ right'`` for contiguous rows, in tiles that no number of threads changes."""
        out = torch.empty(len(left), len(right))

        def tile(begin: int) -> None:
            part = slice(begin, begin + TILE)
            torch.mm(left[part], right.T, out=out[part])

        _on_threads(tile, range(0, len(left), TILE), self._threads)
        return out

    def _check_seen(self, place: Place) -> None:
        for name in self._layout.before(place):
            if self.needs(name) and self._seen.get(name) != self._shapes[name][0]:
                raise PlanError(
                    f"the second moments for {place.name} need {name}, which was not read before"
                    " it; keep that tensor, or choose equal weights"
                )


def _on_threads(work: Callable[[int], Any], starts: range, threads: int | None) -> None:
    """Call `work` for every start; matrix products inside use one thread each."""
    count = min(available_threads() if threads is None else threads, len(starts))
    with one_thread(torch.empty(0)):
        if count <= 1:
            for begin in starts:
                work(begin)
            return
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(work, starts))
