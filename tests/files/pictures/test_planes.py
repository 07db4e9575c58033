"""Left is left: planes and letters against nibabel's canonical orientation, for every orientation of the axes."""

from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from esegeta_monai.errors import InputError
from esegeta_monai.files.pictures.planes import Anatomy

SIZE, SPACING = (6, 7, 8), (1.0, 2.5, 4.0)
SIGNED_PERMUTATIONS = [
    np.array(signs)[:, None] * np.eye(3)[list(order)]
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


def affine_of(axes, oblique):
    tilt = Rotation.from_euler("xyz", (14, -9, 11), degrees=True).as_matrix() if oblique else np.eye(3)
    affine = np.eye(4)
    affine[:3, :3] = tilt @ axes @ np.diag(SPACING)
    affine[:3, 3] = (-20.0, 30.0, 5.0)
    return affine


@pytest.mark.parametrize("oblique", [False, True])
@pytest.mark.parametrize("axes", SIGNED_PERMUTATIONS, ids=str)
def test_cuts_follow_nibabels_canonical_array(axes, oblique):
    affine = affine_of(axes, oblique)
    volume = np.random.default_rng(0).random(SIZE)
    voxel = (4, 2, 6)
    anatomy = Anatomy(SIZE, affine)
    canonical = nib.as_closest_canonical(nib.Nifti1Image(volume, affine))
    array, to_canonical = canonical.get_fdata(), np.linalg.inv(canonical.affine) @ affine
    i, j, k = (int(v) for v in np.round(to_canonical[:3, :3] @ voxel + to_canonical[:3, 3]))
    zooms = canonical.header.get_zooms()
    axial, coronal, sagittal = anatomy.planes()
    np.testing.assert_array_equal(anatomy.cut(volume, voxel, axial), array[:, :, k])
    np.testing.assert_array_equal(anatomy.cut(volume, voxel, coronal), array[:, j, :])
    np.testing.assert_array_equal(anatomy.cut(volume, voxel, sagittal), array[i, :, :])
    assert anatomy.position(voxel, coronal) == pytest.approx(((i + 0.5) * zooms[0], (k + 0.5) * zooms[2]), rel=1e-6)
    assert anatomy.extent(sagittal) == pytest.approx((array.shape[1] * zooms[1], array.shape[2] * zooms[2]), rel=1e-6)
    assert anatomy.world(voxel) == pytest.approx(tuple(nib.affines.apply_affine(affine, voxel)))
    assert (anatomy.tilt > 10) == oblique


def test_letters():
    anatomy = Anatomy(SIZE, np.diag([-1.0, -1.0, 1.0, 1.0]))  # letters belong to the planes, not to the voxel axes
    axial, coronal, sagittal = (plane.sides for plane in anatomy.planes(radiological=True))
    assert axial == {"left": "R", "right": "L", "bottom": "P", "top": "A"}
    assert coronal == {"left": "R", "right": "L", "bottom": "I", "top": "S"}
    assert sagittal == {"left": "A", "right": "P", "bottom": "I", "top": "S"}
    axial, coronal, sagittal = (plane.sides for plane in anatomy.planes(radiological=False))
    assert (axial["left"], axial["right"]) == (coronal["left"], coronal["right"]) == ("L", "R")
    assert sagittal["left"] == "A"


def test_a_single_slice_has_one_plane():
    coronal_slice = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])
    assert [plane.name for plane in Anatomy((20, 30, 1), np.eye(4)).planes()] == ["axial"]
    assert [plane.name for plane in Anatomy((20, 30, 1), coronal_slice).planes()] == ["coronal"]


def test_tilt_is_the_angle_turned():
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("z", 20, degrees=True).as_matrix() @ np.diag(SPACING)
    assert Anatomy(SIZE, affine).tilt == pytest.approx(20)


@pytest.mark.parametrize("broken", [np.zeros((4, 4)), np.diag([1.0, 1.0, 0.0, 1.0]), np.full((4, 4), np.nan)])
def test_a_singular_affine_is_refused(broken):
    with pytest.raises(InputError, match="singular or not finite"):
        Anatomy(SIZE, broken)
