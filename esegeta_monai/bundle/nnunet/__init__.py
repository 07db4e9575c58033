"""nnU-Net v2 model folders: read, preprocess, predict and explain with nnU-Net's own windows, folds and views."""

from __future__ import annotations

from esegeta_monai.bundle.nnunet.files import PROPERTIES, is_nnunet_folder
from esegeta_monai.bundle.nnunet.preprocessing import NnunetPreprocessd
from esegeta_monai.bundle.nnunet.reader import NnunetReader
from esegeta_monai.bundle.nnunet.totalsegmentator import TotalSegmentatorReader
from esegeta_monai.bundle.nnunet.windows import NnunetWindows

__all__ = [
    "PROPERTIES",
    "NnunetPreprocessd",
    "NnunetReader",
    "NnunetWindows",
    "TotalSegmentatorReader",
    "is_nnunet_folder",
]
