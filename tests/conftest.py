"""Every test draws the same numbers, alone or after others: what fails once fails again."""

from __future__ import annotations

import sys

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed torch where it is loaded, before any fixture of the test is made."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)
