"""esegeta_monai: exact whole-volume explanation of 2D and 3D medical image networks, native to MONAI."""

from __future__ import annotations

__version__ = "0.1.0"
