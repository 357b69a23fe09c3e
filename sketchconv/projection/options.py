"""What a user decides about an extraction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sketchconv.errors import RecipeError

if TYPE_CHECKING:
    from sketchconv.calibration.options import Calibration

# A full fine-tune of SmolLM2-135M (30 steps on WikiText-2's validation split), projected on two of
# its sketches; perplexity on 8 windows of 512 tokens of the test split; the tuned dense model 24.1.
# In this order: the sketch; relative without a text, by the diagonal and by the full Hessian (4,096
# tokens of the validation split); absolute without a text and by the full Hessian.
# 4 bits, 4 groups, made without data: 42.4; 38.8, 34.9, 28.5; 40.2, 26.6.
# 3 bits, calibrated and recovered: 40.9; 40.6, not measured, 31.6; 58.7, 32.4.
# Absolute with a full Hessian calibrates a sketch that was made without data on the way.
Target = Literal["absolute", "relative"]
Hessian = Literal["diagonal", "full"]


@dataclass(frozen=True, slots=True)
class ExtractOptions:
    """How tuned weights are projected.

    Args:
        target: "relative" projects the tuned weights' difference to the dense base and adds it to
            the base's LUTs, so that what a calibration put into these stays; "absolute" makes the
            LUTs the means of the tuned weights. None: relative where a dense base is given.
        calibration: text on which the tuned model shows which columns matter; None weighs all
            alike. Its method is not used.
        hessian: with a calibration, "full" projects in the norm of the layer's outputs; "diagonal",
            which is faster and takes less memory, leaves out what columns have in common.
        strict: refuse a fine-tune that changed more than sketched weights.
        max_memory: limit on the process's anonymous memory in bytes.
        threads: of torch; all cores by default.
    """

    target: Target | None = None
    calibration: Calibration | None = None
    hessian: Hessian = "full"
    strict: bool = False
    max_memory: int | None = None
    threads: int | None = None

    @property
    def metric_name(self) -> str:
        """What the report calls the norm."""
        if self.calibration is None:
            return "equal"
        return "hessian" if self.hessian == "full" else "diagonal"

    def resolved(self, *, has_dense: bool) -> Target:
        """The target, once it is known whether there is a dense base.

        Raises:
            RecipeError: options that do not go together, or a text that is none.
            CalibrationError: no such text.
        """
        from sketchconv.calibration.texts import check_texts

        if self.hessian not in ("diagonal", "full"):
            raise RecipeError(f"hessian must be diagonal or full, got {self.hessian!r}")
        if self.calibration is not None:
            if not self.calibration.texts:
                raise RecipeError("a calibration needs a text: --calibration FILE.txt")
            check_texts(self.calibration.texts)
        if self.target == "relative" and not has_dense:
            raise RecipeError("target relative needs the dense model of the base: --dense-base")
        return self.target or ("relative" if has_dense else "absolute")
