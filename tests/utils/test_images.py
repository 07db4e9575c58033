"""Checks of images in memory."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor

from esegeta_monai.errors import InputError
from esegeta_monai.utils.images import check_image


def test_check_image_takes_tensors_from_anywhere() -> None:
    check_image(torch.zeros(1, 4, 4), "batch 0", spatial_dims=2, channels=1)
    with pytest.raises(InputError, match="batch 0: 16 of 16 voxels"):
        check_image(torch.full((1, 4, 4), torch.nan), "batch 0")
    with pytest.raises(InputError, match="1 of 16 voxels"):
        check_image(torch.tensor([[torch.inf] + [0.0] * 15], dtype=torch.bfloat16).reshape(1, 4, 4))
    with pytest.raises(InputError, match="affine is singular"):
        check_image(MetaTensor(torch.zeros(1, 4, 4, 4), affine=torch.zeros(4, 4)))
