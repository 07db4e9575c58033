"""MONAI bundles: read the parts needed for explanation, and run bundles with explanations."""

from __future__ import annotations

from esegeta_monai.bundle.nnunet import NnunetReader, TotalSegmentatorReader
from esegeta_monai.bundle.reader import BundleReader, bundle_network
from esegeta_monai.bundle.workflow import ExplainWorkflow

__all__ = ["BundleReader", "ExplainWorkflow", "NnunetReader", "TotalSegmentatorReader", "bundle_network"]
