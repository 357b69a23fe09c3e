"""Triton decides when it is imported whether its interpreter runs, and other tests import it.

So `cases/` is collected only by children with the interpreter on, which `test_interpreter.py`
starts; by hand: `TRITON_INTERPRET=1 python -P -m pytest tests/gpu/cases`.
"""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["cases"]
