"""What an export wrote and cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ExportReport:
    """The outcome of an export; sizes in bytes, times in seconds.

    Attributes:
        source: name of what was exported.
        files: paths that were written, with their sizes.
        parameters: values in all tensors.
        types: values by type.
        notes: hints for the user.
        source_bytes: of the source's weight files.
        seconds: wall time.
        peak_anonymous: highest anonymous memory seen.
    """

    source: str
    files: tuple[tuple[str, int], ...]
    parameters: int
    types: Mapping[str, int]
    notes: tuple[str, ...]
    source_bytes: int
    seconds: float
    peak_anonymous: int

    @property
    def output_bytes(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size in self.files)

    @property
    def bits_per_weight(self) -> float:
        """All bytes on disk over all parameters."""
        return 8 * self.output_bytes / max(1, self.parameters)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values for ``--json``."""
        return {
            "source": self.source,
            "files": dict(self.files),
            "output_bytes": self.output_bytes,
            "source_bytes": self.source_bytes,
            "parameters": self.parameters,
            "bits_per_weight": self.bits_per_weight,
            "types": dict(self.types),
            "seconds": self.seconds,
            "peak_anonymous_bytes": self.peak_anonymous,
            "notes": list(self.notes),
        }
