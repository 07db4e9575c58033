"""Fixtures for tests of bundles."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture
def no_scripts_from_elsewhere() -> Iterator[None]:
    """The first bundle's `scripts` stay imported in a process; here each test is the first."""
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "scripts"}
    for name in before:
        del sys.modules[name]
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "scripts"]:
        del sys.modules[name]
    sys.modules.update(before)
