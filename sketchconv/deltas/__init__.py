"""LUT-only task deltas: make, look at, check, apply, revert and merge them."""

from sketchconv.deltas.applying import Rewritten, apply, revert
from sketchconv.deltas.binding import BaseBinding, binding_of
from sketchconv.deltas.making import create
from sketchconv.deltas.merging import merge
from sketchconv.deltas.resolving import resolve
from sketchconv.deltas.summary import DeltaSummary, info

__all__ = [
    "BaseBinding",
    "DeltaSummary",
    "Rewritten",
    "apply",
    "binding_of",
    "create",
    "info",
    "merge",
    "resolve",
    "revert",
]
