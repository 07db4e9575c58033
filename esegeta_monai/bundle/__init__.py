"""MONAI bundles: reading one for explanation."""

from __future__ import annotations

from esegeta_monai.bundle.reader import BundleReader

__all__ = ["BundleReader"]
