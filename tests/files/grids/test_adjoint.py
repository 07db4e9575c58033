"""The adjoint of MONAI's spatial transforms: exact, with conserved sums, in every orientation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai import transforms as mt
from monai.data import MetaTensor
from monai.transforms.utils import create_rotate

from esegeta_monai.files.grids.adjoint import _separable_axes
from esegeta_monai.files.grids.trace import steps
from esegeta_monai.transforms import InvertAttribution
from tests.files.grids.support import AFFINE, AXES, SIZE, SUMS, balance, oriented_affine, random_map, scan


def forward(transform, image):
    """The image that the transform makes; a random one draws the same at every call."""
    if isinstance(transform, mt.Randomizable):
        transform.set_random_state(3)
    out = transform(image)
    return out[0] if isinstance(out, (tuple, list)) else out


def forward_matrix(transform, size=SIZE, affine=AFFINE):
    """W of x_net = W x_scan, from MONAI itself: one channel for each scan voxel."""
    voxels = int(np.prod(size))
    unit_images = MetaTensor(torch.eye(voxels, dtype=torch.float64).reshape(voxels, *size), affine=affine)
    return forward(transform, unit_images).as_tensor().double().reshape(voxels, -1).T


TRANSFORMS = {
    "orientation": mt.Orientation("PSL"),
    "flip": mt.Flip((0, -1)),
    "flip all": mt.Flip(None),
    "rotate90": mt.Rotate90(1, (0, 2)),
    "rotate90 three times": mt.Rotate90(3, (2, 1)),
    "crop": mt.SpatialCrop(roi_start=(1, 0, 2), roi_end=(5, 4, 5)),
    "centre crop": mt.CenterSpatialCrop((4, 3, 2)),
    "pad constant": mt.SpatialPad((9, 9, 9)),
    "pad reflect": mt.SpatialPad((9, 9, 9), mode="reflect"),
    "pad replicate": mt.BorderPad(2, mode="replicate"),
    "pad circular": mt.BorderPad(2, mode="circular"),
    "pad symmetric": mt.BorderPad(2, mode="symmetric"),
    "divisible pad": mt.DivisiblePad(4),
    "resize with pad or crop": mt.ResizeWithPadOrCrop((9, 4, 5)),
    "spacing": mt.Spacing((0.6, 1.7, 4.1)),
    "spacing zeros": mt.Spacing((0.6, 1.7, 1.1), padding_mode="zeros"),
    "spacing nearest": mt.Spacing((0.6, 1.7, 1.1), mode="nearest"),
    "spacing reflection": mt.Spacing((0.6, 1.7, 1.1), padding_mode="reflection"),
    "spacing aligned reflection": mt.Spacing((0.6, 1.7, 1.1), padding_mode="reflection", align_corners=True),
    "resize trilinear": mt.Resize((11, 4, 13), mode="trilinear"),
    "resize aligned": mt.Resize((11, 4, 13), mode="trilinear", align_corners=True),
    "resize area": mt.Resize((3, 9, 2)),
    "resize nearest": mt.Resize((3, 9, 2), mode="nearest"),
    "resize nearest-exact": mt.Resize((3, 9, 2), mode="nearest-exact"),
    "zoom in": mt.Zoom(1.7, keep_size=True),
    "zoom out": mt.Zoom(0.6, keep_size=True),
    "zoom out, constant": mt.Zoom(0.6, keep_size=True, padding_mode="constant"),
    "zoom free": mt.Zoom((0.6, 1.3, 2), keep_size=False, mode="trilinear"),
    "rotate": mt.Rotate((0.2, -0.1, 0.3)),
    "rotate zeros, larger": mt.Rotate((0.2, -0.1, 0.3), padding_mode="zeros", keep_size=False),
    "affine": mt.Affine(rotate_params=(0.2, 0.1, 0.3), scale_params=(0.7, 0.8, 0.9), translate_params=(1, 0.5, -0.7)),
    "affine aligned": mt.Affine(rotate_params=(0.2, 0.1, 0.3), padding_mode="zeros", align_corners=True),
    "affine nearest": mt.Affine(rotate_params=(0.2, 0.1, 0.3), mode="nearest", padding_mode="zeros"),
    "random crop": mt.RandSpatialCrop((3, 3, 3), random_size=False),
    "random crop samples": mt.RandSpatialCropSamples((3, 3, 3), num_samples=1, random_size=False),
    "random scale crop": mt.RandScaleCrop(0.6),
    "random flip": mt.RandFlip(prob=1.0),
    "random flip, not drawn": mt.RandFlip(prob=0.0),
    "random axis flip": mt.RandAxisFlip(prob=1.0),
    "random rotate90": mt.RandRotate90(prob=1.0),
    "random rotate": mt.RandRotate(prob=1.0, range_x=0.4),
    "random zoom": mt.RandZoom(prob=1.0, min_zoom=0.6, max_zoom=0.7),
    "random affine": mt.RandAffine(prob=1.0, rotate_range=0.3, scale_range=0.1, spatial_size=(8, 6, 4)),
    "random affine, not drawn": mt.RandAffine(prob=0.0, spatial_size=(8, 6, 4), padding_mode="zeros"),
    "chain": mt.Compose([mt.Orientation("ALS"), mt.Spacing((0.7, 1.9, 2.5)), mt.SpatialPad((12, 8, 8))]),
    "lazy chain": mt.Compose(
        [mt.Orientation("LAS"), mt.Spacing((0.7, 1.9, 2.5)), mt.SpatialPad((12, 8, 8)), mt.Flip(1)], lazy=True
    ),
    "lazy moves": mt.Compose([mt.Orientation("PSL"), mt.SpatialPad((12, 8, 8)), mt.Rotate90(1, (0, 2))], lazy=True),
}


MOVES = ("orientation", "flip", "flip all", "rotate90", "rotate90 three times", "crop", "centre crop")


AMBIGUOUS = pytest.mark.filterwarnings("ignore:.*were lazy, and the trace does not state")


@AMBIGUOUS
@pytest.mark.parametrize("name", TRANSFORMS)
def test_exact_adjoint_of_monais_forward(name):
    transform = TRANSFORMS[name]
    attribution = random_map(forward(transform, scan()))
    expected = (forward_matrix(transform).T @ attribution.as_tensor().reshape(-1)).reshape(1, *SIZE)
    result = InvertAttribution(spread=False)(attribution)
    # MONAI returns float32, and grid positions of Rotate and Affine are float32 inside
    error = (result.as_tensor() - expected).abs().max() / expected.abs().max()
    assert error < (1e-15 if name in MOVES else 1e-5)
    torch.testing.assert_close(result.affine, AFFINE, atol=1e-6, rtol=0)
    assert result.applied_operations == []


@AMBIGUOUS
@pytest.mark.parametrize("spread", [True, False])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_sums_balance(name, spread):
    image = forward(TRANSFORMS[name], scan(channels=2))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        result = InvertAttribution(spread)(random_map(image, dtype=dtype))
        absolute = float(random_map(image, dtype=dtype).abs().sum())
        assert result.dtype == dtype
        assert result.shape == (2, *SIZE)
        assert balance(result) < tolerance * absolute
        assert result.meta["sum_scan_grid"] == pytest.approx(float(result.sum()), abs=1e-5 * absolute)


def test_by_hand_upsampled_row():
    # Scan voxels at 0 and 1 mm; the network sees 0, 0.5 and 1 mm: the middle one was half of each.
    image = mt.Spacing((0.5, 1.0))(scan((2, 1), torch.eye(3, dtype=torch.float64)))
    assert image.shape == (1, 3, 1)
    attribution = MetaTensor(
        torch.tensor([[[1.0], [-4.0], [8.0]]]), meta=image.meta, applied_operations=image.applied_operations
    )
    result = InvertAttribution()(attribution)
    assert result.flatten().tolist() == [1 - 2, 8 - 2]
    assert [result.meta[key] for key in SUMS] == [5.0, 5.0, 0.0]


def test_by_hand_downsampled_row():
    # Network voxels at 0, 2 and 4 mm of a scan at 0 … 4 mm: tents of half-width 2 mm, each summing to 1.
    image = mt.Spacing((2.0, 1.0))(scan((5, 1), torch.eye(3, dtype=torch.float64)))
    assert image.shape == (1, 3, 1)
    values = torch.tensor([3.0, -4.0, 6.0], dtype=torch.float64)
    attribution = MetaTensor(values.view(1, 3, 1), meta=image.meta, applied_operations=image.applied_operations)
    by_hand = (
        3.0 * np.array([2, 1, 0, 0, 0]) / 3 - 4.0 * np.array([0, 1, 2, 1, 0]) / 4 + 6.0 * np.array([0, 0, 0, 1, 2]) / 3
    )
    np.testing.assert_allclose(InvertAttribution()(attribution).flatten().numpy(), by_hand, rtol=1e-14)
    # the exact adjoint: the network has read the voxels at 0, 2 and 4 mm and no others
    assert InvertAttribution(spread=False)(attribution).flatten().tolist() == [3.0, 0.0, -4.0, 0.0, 6.0]


def test_by_hand_padding():
    image = mt.BorderPad((1, 2, 0, 0))(scan((2, 1), torch.eye(3, dtype=torch.float64)))
    values = torch.tensor([10.0, 1.0, 2.0, 20.0, 30.0]).view(1, 5, 1)
    result = InvertAttribution()(MetaTensor(values, meta=image.meta, applied_operations=image.applied_operations))
    assert result.flatten().tolist() == [1.0, 2.0]
    assert [result.meta[key] for key in SUMS] == [63.0, 3.0, 60.0]
    image = mt.BorderPad((1, 2, 0, 0), mode="replicate")(scan((2, 1), torch.eye(3, dtype=torch.float64)))
    result = InvertAttribution()(MetaTensor(values, meta=image.meta, applied_operations=image.applied_operations))
    assert result.flatten().tolist() == [11.0, 52.0]
    assert result.meta["sum_in_padding"] == 0.0


def test_half_sampled_outside():
    # A shift by a quarter voxel with zeros outside: the last network voxel is made of 3/4 scan and 1/4 nothing.
    moved = torch.eye(3, dtype=torch.float64)
    moved[0, 2] = 0.25
    original = scan((3, 1), torch.eye(3, dtype=torch.float64))
    image = mt.SpatialResample(padding_mode="zeros")(original, dst_affine=moved, spatial_size=(3, 1))
    values = torch.tensor([0.0, 0.0, 8.0]).view(1, 3, 1)
    result = InvertAttribution()(MetaTensor(values, meta=image.meta, applied_operations=image.applied_operations))
    assert result.flatten().tolist() == [0.0, 0.0, 6.0]
    assert result.meta["sum_in_padding"] == 2.0


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_downsampled_constant_density_has_no_comb(factor):
    # Network voxels of equal relevance mean equal relevance everywhere; the exact adjoint shows the sampling grid.
    side = 6 * factor + 1
    image = mt.Spacing((factor, factor, factor))(scan((side,) * 3, torch.eye(4, dtype=torch.float64)))
    attribution = MetaTensor(torch.ones_like(image), meta=image.meta, applied_operations=image.applied_operations)
    inner = (0, *(slice(factor, -factor),) * 3)
    smooth = InvertAttribution()(attribution)[inner]
    np.testing.assert_allclose(smooth.numpy(), 1 / factor**3, rtol=1e-6)
    comb = InvertAttribution(spread=False)(attribution).as_tensor()
    read = comb[:, ::factor, ::factor, ::factor]
    np.testing.assert_allclose(read.numpy(), 1.0, rtol=1e-6)
    assert float(comb.sum()) == pytest.approx(read.numel())


def test_oblique_and_parallel_paths_agree():
    """A rotation too small to matter, yet too large to be taken for parallel, goes through the other code."""
    spacing = torch.diag(torch.tensor([1.6, 0.7, 5.0, 1.0], dtype=torch.float64))
    tilt = torch.as_tensor(create_rotate(3, (1e-4, 0.0, 1e-4)))
    original = scan((10, 9, 8))
    results = []
    for affine in (spacing, tilt @ spacing):
        image = mt.SpatialResample(padding_mode="zeros")(original, dst_affine=affine, spatial_size=(7, 26, 6))
        results.append(InvertAttribution()(random_map(image)))
    difference = (results[0].as_tensor() - results[1].as_tensor()).abs().max()
    assert 0 < difference < 3e-3 * results[0].abs().max()
    assert balance(results[1]) < 1e-10


def test_half_precision_is_summed_in_float32():
    image = mt.Spacing((0.5, 2.0, 3.0))(scan())
    result = InvertAttribution()(random_map(image).half())
    assert result.dtype == torch.float32


def test_float32_affine_noise_is_no_obliqueness():
    # NIfTI stores affines as float32; the grids stay parallel, so the exact separable path is taken.
    affine = oriented_affine(AXES[0]).float().double()
    image = mt.Spacing((1.0, 1.5, 2.5))(scan((30, 30, 30), affine))
    (step,), _ = steps(image.applied_operations, image.shape[1:], image.affine)
    assert _separable_axes(step.xform[:-1, :-1], step.size_out) == [0, 1, 2]
