"""The folder of the project's own bundles."""

from __future__ import annotations

from pathlib import Path

BUNDLES = Path(__file__).parents[2] / "bundles"
