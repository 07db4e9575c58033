"""MONAI bundles: reading one for explanation, and running one with explanations."""

from __future__ import annotations

from esegeta_monai.bundle.reader import BundleReader, bundle_network
from esegeta_monai.bundle.workflow import ExplainWorkflow

__all__ = ["BundleReader", "ExplainWorkflow", "bundle_network"]
