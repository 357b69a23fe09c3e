"""Values that are no numbers: refused by name before they can spoil a weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sketchconv.errors import WeightError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from sketchconv.chunks import Chunk


def without_infinity(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows with zeros in place of infinities."""
    import numpy as np

    return np.where(np.isinf(rows), np.float32(0), rows)


def check_finite(chunk: Chunk, rows: npt.NDArray[np.float32], threads: int | None) -> None:
    """Refuse NaN and infinity by name, row and count.

    Raises:
        WeightError: at least one value of these rows is not finite.
    """
    from sketchconv.kernels.cpu import nonfinite_rows

    flat = rows.reshape(1, -1) if rows.ndim < 2 else rows.reshape(rows.shape[0], -1)
    counts = nonfinite_rows(flat, threads=threads)
    if not counts.any():
        return
    row = int(counts.argmax())
    raise WeightError(
        f"{chunk.step.name}: {int(counts.sum())} values are NaN or infinite, the most in row "
        f"{chunk.begin + row} ({int(counts[row])}); repair the checkpoint or exclude the weight"
    )
