"""esegeta_monai: exact whole-volume explanation of 2D and 3D medical image networks, native to MONAI."""

from __future__ import annotations

from esegeta_monai.explainer import Attribution, Explainer

__version__ = "0.1.0"
__all__ = ["Attribution", "Explainer", "__version__"]
