"""Errors: one base class, and one subclass per decision that a caller can take."""

from __future__ import annotations

from sketchconv.formats.errors import FormatError, SketchconvError
from sketchconv.formats.errors import OutputFailure as OutputError

__all__ = [
    "AdapterError",
    "ArchitectureError",
    "CalibrationError",
    "DeltaError",
    "EvaluationError",
    "FormatError",
    "HubError",
    "LoadError",
    "OutputError",
    "PlanError",
    "ProcessError",
    "ProjectionError",
    "RecipeError",
    "ResumeError",
    "ServingError",
    "SketchconvError",
    "SourceError",
    "Suspended",
    "TuningError",
    "WeightError",
]


class SourceError(SketchconvError):
    """The source cannot be read: missing, truncated, a pickle, an unknown format."""


class HubError(SourceError):
    """The Hugging Face Hub refused or does not know the source."""


class ArchitectureError(SourceError):
    """The model's architecture is unknown, or does not fit the tensors of its checkpoint."""


class RecipeError(SketchconvError):
    """An option or a recipe file asks for something that does not exist."""


class PlanError(SketchconvError):
    """Recipe and model do not fit together; nothing was read or written yet."""


class ProjectionError(SketchconvError):
    """Two models cannot be compared weight by weight, or a delta cannot be put in another form."""


class ResumeError(SketchconvError):
    """An interrupted run cannot be gone on with: what it was about has changed."""


class Suspended(KeyboardInterrupt):
    """An interrupt that left finished work on the disk; its text says how to go on."""


class ProcessError(SketchconvError):
    """One of several processes of a conversion ended by itself: killed, or out of memory."""


class WeightError(SketchconvError):
    """A weight cannot be compressed: NaN or infinity, or beyond the range of the LUT's dtype."""


class CalibrationError(SketchconvError):
    """A calibration cannot be done: its text, its state, or the activations that it met."""


class DeltaError(SketchconvError):
    """A delta does not fit its base, or cannot be made, applied, reverted or merged."""


class ServingError(SketchconvError):
    """A server cannot start: a package is missing, or its address cannot be had."""


class LoadError(SketchconvError):
    """A sketch cannot be turned into a model."""


class AdapterError(SketchconvError, ValueError):
    """An adapter cannot be used: it does not fit the model, or there is none of this name."""


class EvaluationError(SketchconvError):
    """A model, a text or a set of questions cannot be measured, or two models not be compared."""


class TuningError(SketchconvError):
    """A sketch cannot be tuned: its form, the data, an option, or a training that diverged."""
