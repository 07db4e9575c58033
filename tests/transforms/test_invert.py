"""The way back to the scan: against the adjoint of MONAI's own forward transforms, and against sums by hand."""

from __future__ import annotations

import re
import warnings

import nibabel as nib
import numpy as np
import pytest
import torch
from monai import transforms as mt
from monai.data import MetaTensor, decollate_batch, list_data_collate

from esegeta_monai.errors import InputError
from esegeta_monai.transforms import InvertAttribution, InvertAttributionD, InvertAttributiond, InvertAttributionDict
from tests.files.grids.support import AFFINE, AXES, SIZE, balance, oriented_affine, random_map, scan

GRIDS = {"finer": (1.1, 0.9, 1.3), "coarser": (2.9, 2.2, 3.7), "mixed": (1.0, 1.0, 4.1)}


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


def test_lazy_padding_after_lazy_sampling_gives_an_ambiguity_warning():
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


class Shear(mt.InvertibleTransform):
    """A traced transform that the package has never heard of."""

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
    refused(re.escape("a grid of (7, 6, 4), its image one of (7, 6, 5)"), torch.zeros(1, 7, 6, 4), image)
    refused("2D or 3D", torch.zeros(1, 1, *SIZE), MetaTensor(torch.zeros(1, 1, *SIZE)))
    with pytest.raises(InputError, match="orig_keys names 'scan'"):
        InvertAttributiond("map", orig_keys="scan")({"map": image})


def test_lambda_is_taken_for_an_intensity_transform_aloud():
    image = mt.Lambda(lambda x: x * 2)(mt.Flip(0)(scan()))
    with pytest.warns(UserWarning, match="Lambda is assumed to change intensities only"):
        result = InvertAttribution()(random_map(image))
    assert torch.equal(result.as_tensor(), random_map(image).as_tensor().flip(1))
