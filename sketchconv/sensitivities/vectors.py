"""Means and covariances of whole vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sketchconv.sensitivities.activations import Vector

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 4096  # embeddings whose products are summed at once
PIECE = 512  # rows of which there are float64 copies at a time


@dataclass(frozen=True, slots=True)
class Whole:
    """Mean ``[n]`` and covariance ``[n, n]`` of a vector, float32."""

    mean: Tensor
    covariance: Tensor

    @property
    def moments(self) -> Tensor:
        """E[x x'], ``[n, n]``."""
        return self.covariance + torch.outer(self.mean, self.mean)

    @property
    def square(self) -> Vector:
        """Mean square of each channel."""
        squares: Vector = (self.covariance.diagonal().double() + self.mean.double() ** 2).numpy()
        return squares


def normalised(
    x: Whole, gain: Vector, bias: Vector | None, epsilon: float, *, centred: bool
) -> Whole:
    """RMSNorm, or `centred` LayerNorm: Zhang and Sennrich 2019; Ba et al. 2016, equation 4.

    All vectors are divided alike, by the root of the mean square over channels.
    """
    mean, covariance = x.mean, x.covariance
    if centred:
        mean = mean - mean.mean()
        covariance = covariance - covariance.mean(0, keepdim=True)
        covariance = covariance - covariance.mean(1, keepdim=True)
    size = float(Whole(mean, covariance).square.mean()) + epsilon
    scale = torch.from_numpy(gain / math.sqrt(size)).float()
    mean = scale * mean
    if bias is not None:
        mean = mean + torch.from_numpy(bias).float()
    return Whole(mean, covariance * torch.outer(scale, scale))


def through(weight: Tensor, mean: Tensor) -> Tensor:
    """``W m``, in float32 from sums in float64."""
    parts = [rows.double() @ mean.double() for rows in torch.split(weight, PIECE)]
    return torch.cat(parts).float()
