"""Pictures and reports of attribution maps."""

from __future__ import annotations

from esegeta_monai.report.picture import INTENDED_USE, save_picture

__all__ = ["INTENDED_USE", "save_picture"]
