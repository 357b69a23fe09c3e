"""What the tests of importers share."""

from __future__ import annotations

import sys
from pathlib import Path

# Test folders are no packages (see the notes on the name `kernels`), so helpers are found so.
sys.path.insert(0, str(Path(__file__).parent))
