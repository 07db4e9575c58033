"""Label maps from files, tensors and data keys on the grid of a prediction."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from esegeta_monai.errors import TargetError
from esegeta_monai.targets import Case, LabelMask
from tests.support.tensors import noise

AFFINE = torch.tensor([[-2.0, 0, 0, 10], [0, 0, 3, -5], [0, 1.5, 0, 2], [0, 0, 0, 1]], dtype=torch.float64)


SHAPE = (8, 9, 7)


def full(score, shape=SHAPE) -> torch.Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[score.box] = score.mask
    return mask


@pytest.mark.parametrize("kind", ["tensor", "with_channel", "key", "file", "flipped_file"])
def test_label_mask_from_everywhere(kind, tmp_path):
    p = noise(3, *SHAPE)
    labels = (noise(*SHAPE) > 0.3).long() * 2
    case = Case(affine=AFFINE)
    if kind == "tensor":
        mask = labels
    elif kind == "with_channel":
        mask = labels[None]
    elif kind == "key":
        mask, case = "label", Case(affine=AFFINE, data={"label": labels[None]})
    else:
        array, affine = labels.numpy().astype(np.uint8), AFFINE.numpy()
        if kind == "flipped_file":  # the same places of the world, stored the other way round
            flip = np.diag([-1.0, 1, 1, 1])
            flip[0, 3] = SHAPE[0] - 1
            array, affine = array[::-1].copy(), affine @ flip
        mask = tmp_path / "label.nii.gz"
        nibabel.save(nibabel.Nifti1Image(array, affine), mask)
    (score,) = LabelMask(mask, label=2, class_index=1).bind(p, case)
    assert torch.equal(full(score), labels == 2)
    assert score.channels == (1,)


def test_label_mask_options():
    p, labels = noise(3, *SHAPE), (noise(*SHAPE) > 0.3).long() * 2
    assert LabelMask(labels, label=2).bind(p, Case())[0].class_index == 2
    assert LabelMask(labels, class_index=0).bind(p, Case())[0].voxels == int((labels > 0).sum())
    assert LabelMask(labels > 0, 1, class_index=0).bind(p, Case())[0].voxels == int((labels > 0).sum())
    with pytest.raises(TargetError, match="needs class_index"):
        LabelMask(labels).bind(p, Case())
    with pytest.raises(TargetError, match="neither a file nor a key"):
        LabelMask("nothing", label=1).bind(p, Case(data={"label": labels}))
    with pytest.raises(TargetError, match="no affine"):
        LabelMask(labels[1:], label=1).bind(p, Case(affine=AFFINE))


def test_a_metatensor_of_another_grid_is_resampled():
    p = noise(2, *SHAPE)
    coarse = torch.zeros(4, 9, 7)
    coarse[1] = 1  # voxels 2 and 3 of the first axis, at twice the spacing
    affine = AFFINE.clone()
    affine[:, 0] *= 2
    affine[:3, 3] += AFFINE[:3, 0] / 2
    (score,) = LabelMask(MetaTensor(coarse[None], affine=affine), class_index=1).bind(p, Case(affine=AFFINE))
    expected = torch.zeros(SHAPE, dtype=torch.bool)
    expected[2:4] = True
    assert torch.equal(full(score), expected)


def test_an_affine_of_another_shape_is_named():
    """A batch that was not collated by MONAI loses the rows of its affine when it is taken apart."""
    label = MetaTensor(torch.ones(1, 4, 4), affine=torch.eye(3))
    label.meta["affine"] = torch.ones(4)
    with pytest.raises(TargetError, match=r"an affine of shape \(4,\).*list_data_collate"):
        LabelMask(label).bind(torch.zeros(2, 4, 4), Case(torch.eye(3), {}, {}))
