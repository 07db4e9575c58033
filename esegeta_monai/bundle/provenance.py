"""Provenance of an explanation: the bundle's name, version, and hashes of its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from esegeta_monai.bundle.metadata import BundleMetadata
from esegeta_monai.bundle.overlay import METRICS_OVERLAY, MULTI_GPU_OVERLAY, OVERLAY
from esegeta_monai.utils.files import sha256_file

__all__ = ["bundle_provenance"]

OVERLAYS = (OVERLAY, METRICS_OVERLAY, MULTI_GPU_OVERLAY)
"""Files of this package among a bundle's configs; they change no prediction."""


def bundle_provenance(bundle_root: str | Path) -> dict[str, Any]:
    """Return name and version of a bundle and the SHA-256 of each config file by file name, JSON-ready.

    The weights are hashed in memory (`esegeta_monai.engine.network.state.weights_hash`), because any file may have been
    loaded.
    """
    root = Path(bundle_root)
    metadata = BundleMetadata.read(root)
    files = sorted(p for p in (root / "configs").glob("*") if p.suffix in (".json", ".yaml", ".yml"))
    return {
        "bundle": metadata.name or root.resolve().name,
        "bundle_version": metadata.version,
        "configs_sha256": {p.name: sha256_file(p) for p in files if p.name not in OVERLAYS},
    }
