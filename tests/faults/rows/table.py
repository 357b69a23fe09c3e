"""All rows, in order."""

from __future__ import annotations

from rows.full_disk import R4
from rows.fuzz import S3
from rows.kills import R1, R2

ROWS = (S3, R1, R2, R4)
