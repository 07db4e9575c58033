"""MeshNet (brainchop, MIT): an independent tissue segmentation network, rebuilt from its weights as a reference."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from nibabel.processing import conform

DILATIONS = (1, 2, 4, 8, 16, 8, 4, 2, 1)
#: MeshNet: 1 white, 2 grey; the bundle: 1 grey, 2 white.
TO_BUNDLE_CLASSES = np.array([0, 2, 1], dtype=np.uint8)


def load_meshnet(weights: Path) -> torch.nn.Sequential:
    """Build nine dilated 3x3x3 convolutions with ReLU and a 1x1x1 convolution to three classes."""
    from safetensors.torch import load_file

    state = {key.removeprefix("model."): value for key, value in load_file(weights).items()}
    width = state["0.weight"].shape[0]
    layers: list[torch.nn.Module] = []
    for index, dilation in enumerate(DILATIONS):
        layers += [torch.nn.Conv3d(width if index else 1, width, 3, padding=dilation, dilation=dilation)]
        layers += [torch.nn.ReLU()]
    network = torch.nn.Sequential(*layers, torch.nn.Conv3d(width, 3, 1))
    network.load_state_dict(state)
    return network.eval()


def meshnet_tissue(image: Path, weights: Path) -> nib.Nifti1Image:
    """Classes of the bundle (0 background, 1 grey, 2 white) on MeshNet's own grid: 256³, 1 mm, LIA."""
    conformed = conform(nib.load(image), out_shape=(256, 256, 256), voxel_size=(1, 1, 1), orientation="LIA")
    values = conformed.get_fdata(dtype=np.float32)
    values = (values - values.min()) / (values.max() - values.min())
    with torch.no_grad():
        classes = load_meshnet(weights)(torch.from_numpy(values)[None, None]).argmax(1)[0].numpy()
    return nib.Nifti1Image(TO_BUNDLE_CLASSES[classes], conformed.affine)
