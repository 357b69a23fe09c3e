"""What cannot be shared among processes is refused before any work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sketchconv.errors import RecipeError

if TYPE_CHECKING:
    from sketchconv.calibration.options import Calibration
    from sketchconv.moments import Moments
    from sketchconv.recipe import Recipe


def check_jobs(jobs: object) -> None:
    """Refuse a number of processes that is none.

    Raises:
        RecipeError: it is no integer of at least 1.
    """
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise RecipeError(f"jobs must be an integer of at least 1, got {jobs!r}")


def check_shareable(
    jobs: int, recipe: Recipe, moments: Moments, calibration: Calibration | None
) -> None:
    """Refuse what only one process can do.

    Raises:
        RecipeError: a calibration on a text, or covariances.
    """
    if jobs == 1:
        return
    if calibration is not None and calibration.texts:
        raise RecipeError(
            f"--jobs {jobs} does not go with --calibration, which passes its text through one "
            "block after the other; drop one of them (--threads spreads a calibration)"
        )
    weighting = recipe.weighting_for(calibrated=calibration is not None)
    if weighting == "covariances" and moments.order:
        raise RecipeError(
            f"--jobs {jobs} does not go with --weighting covariances, the default at 3 bits and "
            "fewer, whose matrices one process holds; drop --jobs, or pass --weighting moments"
        )


def check_threads(jobs: int, threads: int | None) -> None:
    """Refuse fewer threads than processes.

    Raises:
        RecipeError: with both numbers.
    """
    if threads is not None and jobs > 1 and threads < jobs:
        raise RecipeError(
            f"--threads {threads} is for all processes together, and --jobs {jobs} needs at least "
            f"one for each; pass --threads {jobs} or more, or fewer --jobs"
        )
