"""The way back to the scan: against the adjoint of MONAI's own forward transforms, and against sums by hand."""

from __future__ import annotations

import itertools
import re
import warnings

import nibabel as nib
import numpy as np
import pytest
import torch
from monai import transforms as mt
from monai.data import MetaTensor, decollate_batch, list_data_collate
from monai.transforms.utils import create_rotate

from esegeta_monai.errors import InputError
from esegeta_monai.files.grids.adjoint import _separable_axes
from esegeta_monai.files.grids.trace import steps
from esegeta_monai.transforms import InvertAttribution, InvertAttributionD, InvertAttributiond, InvertAttributionDict

SIZE = (7, 6, 5)
AFFINE = torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0], dtype=torch.float64))
SUMS = ("sum_network_grid", "sum_scan_grid", "sum_in_padding")


def scan(size=SIZE, affine=AFFINE, channels=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return MetaTensor(torch.rand(channels, *size, generator=generator, dtype=torch.float64).to(dtype), affine=affine)


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


def random_map(image, seed=0, dtype=torch.float64):
    values = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return MetaTensor(values.to(dtype), meta=image.meta, applied_operations=image.applied_operations)


def balance(result):
    """|sum_network_grid − sum_scan_grid − sum_in_padding|"""
    network, on_scan, padding = (result.meta[key] for key in SUMS)
    return abs(network - on_scan - padding)


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


AXES = [
    np.array(signs)[:, None] * np.eye(3)[list(order)]
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]
GRIDS = {"finer": (1.1, 0.9, 1.3), "coarser": (2.9, 2.2, 3.7), "mixed": (1.0, 1.0, 4.1)}


def oriented_affine(axes, spacing=(1.2, 1.7, 2.6), oblique=True):
    """Voxel axes along ``axes`` (a signed permutation), tilted by some 15 degrees, with anisotropic voxels."""
    tilt = create_rotate(3, (0.26, -0.17, 0.21))[:3, :3] if oblique else np.eye(3)
    affine = np.eye(4)
    affine[:3, :3] = tilt @ axes @ np.diag(spacing)
    affine[:3, 3] = (-31.5, 17.25, 4.0)
    return torch.as_tensor(affine)


def preprocessing(spacing):
    return mt.Compose(
        [
            mt.Orientationd("image", "RAS", labels=None),
            mt.Spacingd("image", spacing),
            mt.CropForegroundd("image", "image", margin=2, allow_smaller=False),
        ]
    )


def world(affine, voxel):
    return (affine @ torch.tensor([*map(float, voxel), 1.0], dtype=torch.float64))[:3]


@pytest.mark.parametrize("oblique", [False, True], ids=["straight", "oblique"])
@pytest.mark.parametrize("axes", AXES, ids=lambda axes: "".join(nib.aff2axcodes(oriented_affine(axes, oblique=False))))
def test_every_orientation_there_and_back(axes, oblique):
    size, affine = (20, 17, 15), oriented_affine(axes, oblique=oblique)
    values = torch.zeros(1, *size)
    values[:, 5:15, 4:13, 4:12] = 1.0
    for spacing in GRIDS.values():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            data = preprocessing(spacing)({"image": MetaTensor(values, affine=affine)})
            image = data["image"]
            attribution = random_map(image)  # of both signs: the sum nearly cancels
            back = InvertAttributiond("map", orig_keys="image")({**data, "map": attribution.as_tensor()})["map"]
        assert back.shape == (1, *size)
        torch.testing.assert_close(back.affine, affine, atol=1e-6, rtol=0)
        assert balance(back) < 1e-12 * float(attribution.abs().sum())
        assert float(back.sum()) == pytest.approx(float(attribution.sum()) - back.meta["sum_in_padding"], rel=1e-9)

        # a planted peak: its place in the world is that of the network voxel, within half a voxel
        peak = tuple(n // 2 for n in image.shape[1:])
        planted = torch.zeros_like(image.as_tensor())
        planted[(0, *peak)] = 1.0
        result = InvertAttribution()(planted, image)[0].as_tensor().double()
        strongest = np.unravel_index(int(result.argmax()), size)
        centre = (torch.nonzero(result).double() * result[result != 0][:, None]).sum(0)
        true_voxel = torch.linalg.solve(affine, torch.cat([world(image.affine, peak), torch.ones(1)]))[:3]
        assert (torch.tensor(strongest) - true_voxel).abs().max() <= 0.5 + 1e-5
        assert (centre - true_voxel).abs().max() <= 0.5
        assert float(result.sum()) == pytest.approx(1.0, abs=1e-6)


def test_invertd_serves_maps_that_do_not_add_up():
    """CAM-type maps are interpolated: a constant stays that constant, a peak stays where it is."""
    for axes in AXES[::5]:
        affine = oriented_affine(axes)
        chain = mt.Compose([mt.Orientationd("image", "RAS", labels=None), mt.Spacingd("image", (0.9, 1.1, 1.3))])
        data = chain({"image": MetaTensor(torch.rand(1, 12, 11, 10), affine=affine)})
        peak = tuple(n // 2 for n in data["image"].shape[1:])
        grid = torch.stack(torch.meshgrid(*map(torch.arange, data["image"].shape[1:]), indexing="ij")).double()
        distance = (grid - torch.tensor(peak).view(3, 1, 1, 1)) * torch.tensor((0.9, 1.1, 1.3)).view(3, 1, 1, 1)
        # MetaTensors: Invertd leaves a plain tensor as it is, with a warning
        data["bump"] = MetaTensor(torch.exp(-(distance**2).sum(0, keepdim=True) / 8).float())
        data["flat"] = MetaTensor(torch.full(data["bump"].shape, 0.7))
        back = mt.Invertd(["bump", "flat"], chain, orig_keys="image", nearest_interp=False)(data)
        assert back["bump"].shape == (1, 12, 11, 10)
        torch.testing.assert_close(back["bump"].affine, affine, atol=1e-6, rtol=0)
        torch.testing.assert_close(back["flat"].as_tensor(), torch.full((1, 12, 11, 10), 0.7))
        strongest = np.unravel_index(int(back["bump"].argmax()), (12, 11, 10))
        true_voxel = torch.linalg.solve(affine, torch.cat([world(data["image"].affine, peak), torch.ones(1)]))[:3]
        assert (torch.tensor(strongest) - true_voxel).abs().max() <= 0.5 + 1e-5


def test_chain_from_file_needs_no_warning(tmp_path):
    affine = oriented_affine(AXES[11]).numpy()
    file = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random((10, 9, 8), dtype=np.float32), affine), file)
    chain = mt.Compose(
        [
            mt.LoadImaged("image"),
            mt.EnsureChannelFirstd("image"),
            mt.Orientationd("image", "LPS", labels=None),
            mt.Spacingd("image", (2.0, 1.0, 1.5)),
            mt.ScaleIntensityd("image"),
            mt.NormalizeIntensityd("image", nonzero=True),
            mt.EnsureTyped("image"),
            mt.SpatialPadd("image", (24, 24, 24)),
        ]
    )
    data = chain({"image": file})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = InvertAttribution()(random_map(data["image"]))
    assert back.shape == (1, 10, 9, 8)
    np.testing.assert_allclose(back.affine, nib.load(file).affine, atol=1e-6)
    np.testing.assert_allclose(back.meta["pixdim"][1:4], nib.load(file).header["pixdim"][1:4], atol=1e-6)
    assert back.meta["filename_or_obj"] == str(file)
    # a transform that leaves no trace is noticed where the file's grid is known
    untraced = mt.Compose([mt.LoadImage(ensure_channel_first=True), mt.Transpose((0, 2, 1, 3)), mt.Flip(0)])(file)
    with pytest.warns(UserWarning, match="left no trace"):
        InvertAttribution()(torch.zeros(untraced.shape), untraced)


def cube():
    values = torch.zeros(1, 12, 11, 10)
    values[:, 3:, 4:9, 4:9] = 1.0
    return MetaTensor(values, affine=AFFINE)


def test_a_lazy_crop_that_looks_at_the_data_is_a_step_of_its_own():
    transforms = [
        mt.Spacingd("image", (0.7, 1.5, 2.0)),
        mt.CropForegroundd("image", "image", margin=3, allow_smaller=False),  # pads with zeros
        mt.Flipd("image", 0),
    ]
    eager, lazy = (mt.Compose(transforms, lazy=lazy)({"image": cube()})["image"] for lazy in (False, True))
    attribution = random_map(eager).as_tensor()
    expected, result = InvertAttribution()(attribution, eager), InvertAttribution()(attribution, lazy)
    assert expected.meta["sum_in_padding"] != 0
    torch.testing.assert_close(result.as_tensor(), expected.as_tensor(), rtol=0, atol=1e-12)
    assert result.meta["sum_in_padding"] == pytest.approx(expected.meta["sum_in_padding"])


def test_lazy_padding_after_lazy_sampling_is_ambiguous_and_says_so():
    image = mt.Compose([mt.Spacing((0.7, 1.5, 2.0)), mt.SpatialPad((24, 24, 24))], lazy=True)(scan())
    with pytest.warns(UserWarning, match=r"SpatialResample \+ SpatialPad were lazy"):
        result = InvertAttribution()(random_map(image))
    assert balance(result) < 1e-9


def test_batches_are_decollated_first():
    chain = mt.Compose([mt.Orientationd("image", "PSL", labels=None), mt.Spacingd("image", (1.3, 1.4, 1.5))])
    cases = [chain({"image": scan()}) for _ in range(2)]
    attribution = random_map(cases[0]["image"]).as_tensor()
    expected = InvertAttribution()(attribution, cases[0]["image"])
    batch = list_data_collate(cases)
    for case in decollate_batch(batch):
        result = InvertAttribution()(attribution, case["image"])
        torch.testing.assert_close(result.as_tensor(), expected.as_tensor(), rtol=0, atol=0)
        torch.testing.assert_close(result.affine, AFFINE, rtol=0, atol=1e-12)
    refused("decollate", attribution, batch["image"])


def test_two_dimensions_with_a_three_dimensional_affine():
    image = mt.Resize((5, 9), mode="bilinear")(mt.Flip(0)(scan((10, 6), AFFINE)))
    result = InvertAttribution()(random_map(image))
    assert result.shape == (1, 10, 6)
    torch.testing.assert_close(result.affine, AFFINE, atol=1e-12, rtol=0)
    assert balance(result) < 1e-12


def test_dictionary_transform_keeps_to_monais_conventions():
    assert InvertAttributionD is InvertAttributionDict is InvertAttributiond
    data = mt.Flipd("image", 0)({"image": scan()})
    attribution = random_map(data["image"])
    data["map"] = attribution
    before = attribution.clone()
    result = InvertAttributiond(["map", "missing"], orig_keys="image", allow_missing_keys=True)(data)
    assert data["map"] is attribution
    assert torch.equal(attribution.as_tensor(), before.as_tensor())
    assert len(attribution.applied_operations) == 1
    assert len(data["image"].applied_operations) == 1
    assert "sum_scan_grid" not in data["map"].meta
    assert torch.equal(result["map"].as_tensor(), before.as_tensor().flip(1))
    assert "missing" not in result
    assert torch.equal(InvertAttributiond("map")(data)["map"].as_tensor(), result["map"].as_tensor())
    with pytest.raises(KeyError):
        InvertAttributiond("missing", orig_keys="image")(data)


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


class Shear(mt.InvertibleTransform):
    """A traced transform that the package does not know."""

    def __call__(self, image):
        return self.push_transform(image, extra_info={"shear": 0.3})


def refused(match, attribution, image=None):
    with pytest.raises(InputError, match=match):
        InvertAttribution()(attribution, image)


def test_what_cannot_be_brought_back_is_named():
    image = scan()
    refused("adjoint of Shear is not known.*Invertd", random_map(Shear()(scan())))
    refused(re.escape("BorderPad with mode='mean'"), random_map(mt.BorderPad(1, mode="mean")(image)))
    refused("plain tensor", torch.zeros(1, *SIZE))
    refused("lazy transforms are pending.*Flip.*ApplyPendingd", mt.Flip(0, lazy=True)(scan()))
    refused(re.escape("(7, 6, 4), its image one of (7, 6, 5)"), torch.zeros(1, 7, 6, 4), image)
    refused("2D or 3D", torch.zeros(1, 1, *SIZE), MetaTensor(torch.zeros(1, 1, *SIZE)))
    with pytest.raises(InputError, match="orig_keys names 'scan'"):
        InvertAttributiond("map", orig_keys="scan")({"map": image})


def test_lambda_counts_as_an_intensity_transform_with_a_warning():
    image = mt.Lambda(lambda x: x * 2)(mt.Flip(0)(scan()))
    with pytest.warns(UserWarning, match="Lambda is assumed to change intensities only"):
        result = InvertAttribution()(random_map(image))
    assert torch.equal(result.as_tensor(), random_map(image).as_tensor().flip(1))
