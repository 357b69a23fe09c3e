"""Triton decides when it is imported whether its interpreter runs, and other tests import it.

So `cases/` is collected where there is a GPU to run the kernels on, and by children with the
interpreter on, which `test_interpreter.py` starts; by hand:
`TRITON_INTERPRET=1 python -P -m pytest tests/gpu/cases`.
"""

from __future__ import annotations

import os

import torch

_runs = os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()
collect_ignore = [] if _runs else ["cases"]
