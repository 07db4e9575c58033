"""esegeta_monai: exact whole-volume explanation of 2D and 3D medical image networks, native to MONAI."""

from __future__ import annotations

from esegeta_monai.explain.explainer import Attribution, Attributions, Explainer
from esegeta_monai.utils.files import VERSION

__version__ = VERSION
__all__ = ["Attribution", "Attributions", "Explainer", "__version__"]
