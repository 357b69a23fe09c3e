"""All rows, in order."""

from __future__ import annotations

from rows.bad_inputs import S1
from rows.digests import R7
from rows.full_disk import R4
from rows.fuzz import S3
from rows.kills import R1, R2
from rows.memory import R5
from rows.valid import R6, R12, S2, S4

ROWS = (S1, S2, S3, S4, R1, R2, R4, R5, R6, R7, R12)
