"""The lock under which the tensors of sketch modules change places."""

from __future__ import annotations

import os
import threading

# Two threads at once would turn an index twice, or find a LUT neither in place nor parked.
places = threading.RLock()


def _after_fork() -> None:
    """A thread that the fork left behind may hold the lock."""
    global places
    places = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
