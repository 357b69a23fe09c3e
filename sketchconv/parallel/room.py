"""How much memory each process of a shared conversion may take for its chunks."""

from __future__ import annotations

from dataclasses import dataclass

from sketchconv.errors import PlanError
from sketchconv.memory import DEFAULT_CHUNK_BYTES, MIN_CHUNK_BYTES

_LEAST = MIN_CHUNK_BYTES * 10 // 9 + 1


@dataclass(frozen=True, slots=True)
class Room:
    """What is in use before the first weight, in bytes.

    Attributes:
        used: by this process.
        each: by every other one: the interpreter and its libraries.
        moments: what the column weights will take, 0 where none are made.
    """

    used: int
    each: int
    moments: int

    def needed(self, jobs: int) -> int:
        """The least that a conversion by so many other processes takes."""
        return self.used + self.moments + bool(self.moments) * _LEAST + jobs * (self.each + _LEAST)

    def chunk_budget(self, max_memory: int | None, jobs: int) -> int:
        """Bytes that one row chunk and its results may take, in each process.

        Args:
            max_memory: limit on the anonymous memory of all processes together, or None.
            jobs: number of the other processes.

        Raises:
            PlanError: the limit leaves too little beside what is in use.
        """
        if max_memory is None:
            return DEFAULT_CHUNK_BYTES
        if max_memory < self.needed(jobs):
            raise PlanError(self._refusal(max_memory, jobs))
        left = max_memory - self.used - self.moments - jobs * self.each
        # A tenth stays free for the solver's scratch and the allocator, as with one process.
        return min(left // (jobs + bool(self.moments)) * 9 // 10, DEFAULT_CHUNK_BYTES)

    def _refusal(self, max_memory: int, jobs: int) -> str:
        fits = max((n for n in range(1, jobs) if self.needed(n) <= max_memory), default=1)
        way_out = f"--jobs {fits} fits" if fits > 1 else "drop --jobs"
        moments = f", {self.moments:,} go to column weights" if self.moments else ""
        return (
            f"--max-memory {max_memory:,} bytes is too little for --jobs {jobs}: before the first "
            f"weight {self.used:,} are in use here and {self.each:,} in each of {jobs} "
            f"processes{moments}, so at least {self.needed(jobs):,} are needed; {way_out}"
        )
