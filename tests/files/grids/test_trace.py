"""MONAI's trace is read as linear operations: one sentence for each transform, x_out(i) = Σ_j k(X i − j) x_in(j)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai import transforms as mt
from monai.data import MetaTensor

from esegeta_monai.errors import InputError
from esegeta_monai.files.grids.trace import steps

AFFINE = torch.diag(torch.tensor([2.0, 3.0, 1.0], dtype=torch.float64))


def read(transform, size=(6, 4)):
    image = transform(MetaTensor(torch.rand(1, *size), affine=AFFINE))
    return steps(image.applied_operations, image.shape[1:], image.affine)


def test_last_first_with_sizes_and_matrices_by_hand():
    chain = mt.Compose([mt.Flip(0), mt.BorderPad((1, 1, 0, 2), mode="edge"), mt.Resize((4, 3)), mt.ScaleIntensity()])
    (resize, pad, flip), affine = read(chain)
    assert (resize.name, resize.size_in, resize.size_out, resize.kernel) == ("Resize", (8, 6), (4, 3), "area")
    np.testing.assert_allclose(resize.xform, [[2, 0, 0.5], [0, 2, 0.5], [0, 0, 1]])
    assert (pad.name, pad.size_in, pad.size_out, pad.padding) == ("BorderPad", (6, 4), (8, 6), "border")
    np.testing.assert_array_equal(pad.xform, [[1, 0, -1], [0, 1, 0], [0, 0, 1]])
    assert (flip.name, flip.size_in, flip.size_out) == ("Flip", (6, 4), (6, 4))
    np.testing.assert_array_equal(flip.xform, [[-1, 0, 5], [0, 1, 0], [0, 0, 1]])
    torch.testing.assert_close(affine, AFFINE, rtol=0, atol=1e-12)


def test_a_quarter_turn_by_hand():
    (turn,), _ = read(mt.Rotate90(1))
    assert (turn.size_in, turn.size_out) == ((6, 4), (4, 6))
    # torch.rot90: out(a, b) = in(b, 3 − a)
    np.testing.assert_array_equal(turn.xform, [[0, 1, 0], [-1, 0, 3], [0, 0, 1]])


def test_compound_transforms_come_apart():
    (pad, crop), _ = read(mt.ResizeWithPadOrCrop((9, 2)))
    assert (pad.name, pad.size_in, pad.size_out) == ("SpatialPad", (6, 2), (9, 2))
    assert (crop.name, crop.size_in, crop.size_out) == ("CenterSpatialCrop", (6, 4), (6, 2))
    crop, zoom = read(mt.Zoom(1.5))[0][-2:]
    assert (crop.size_in, zoom.name, zoom.size_out) == ((9, 6), "Zoom", (9, 6))


def test_random_transforms_that_did_nothing_leave_no_step():
    chain = mt.Compose([mt.RandFlip(prob=0.0), mt.RandRotate90(prob=0.0), mt.RandZoom(prob=0.0)])
    assert read(chain)[0] == []


def test_a_step_that_changes_nothing_knows_it():
    (step,), _ = read(mt.Spacing((2.0, 3.0)))
    assert step.is_identity


def test_a_singular_step_is_refused():
    with pytest.raises(InputError, match=r"Resize maps the scan's grid .* by a singular matrix"):
        read(mt.Resize((1, 4), mode="bilinear", align_corners=True))
