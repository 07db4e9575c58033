"""Features: grids, supervoxels, label maps on other grids, channels, and their table."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SimpleInferer

from esegeta_monai.engine.feature_masks import Channels, Features, Grid, LabelMap, Supervoxels, features_for, table_csv
from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import EsegetaError, InputError, UsageError
from esegeta_monai.targets import Case, ClassScore
from tests.support.objectives import Naive
from tests.support.shapley import Quadratic
from tests.support.tensors import noise


def of(image: torch.Tensor) -> Objective:
    return Naive(Quadratic(image.numel()), image, [ClassScore(1)], SimpleInferer()).objective


def phantom(*shape: int) -> torch.Tensor:
    """Zero background, a ball of 1 with a smaller one of 2 inside, and a hole of background value."""
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n, dtype=torch.float64) for n in shape), indexing="ij")
    radius = sum(a**2 for a in axes).sqrt()
    image = (radius < 0.8).double() + (radius < 0.4).double()
    image[tuple(n // 2 for n in shape)] = 0
    return image[None]


def test_grid_tiles_the_image_and_keeps_the_rest_of_the_last_boxes():
    features = Grid((4, 3)).of(of(noise(1, 6, 7)))
    assert len(features) == 2 * 3
    assert features.names[4] == "box 4 3"
    expected = torch.arange(6)[:, None] // 4 * 3 + torch.arange(7) // 3
    assert torch.equal(features.labels[0], expected)
    assert features.counts.tolist() == [12, 12, 4, 6, 6, 2]


def test_grid_per_channel():
    features = Grid(4, per_channel=True).of(of(noise(2, 4, 8)))
    assert len(features) == 4
    assert features.labels[1].unique().tolist() == [2, 3]
    assert features.names[3] == "channel 1, box 0 4"


def test_channels():
    features = Channels(["T1", "T2"]).of(of(noise(2, 3, 4, 5)))
    assert features.names == ["T1", "T2"]
    assert features.labels.shape == (2, 3, 4, 5)
    assert bool((features.labels[1] == 1).all())
    with pytest.raises(UsageError, match="1 names for 2 channels"):
        Channels(["T1"]).of(of(noise(2, 3, 4)))


@pytest.mark.parametrize("shape", [(40, 44), (20, 22, 24)])
def test_supervoxels_cover_the_foreground_follow_edges_and_repeat(shape):
    image = phantom(*shape)
    objective = of(image)
    features = Supervoxels(n_segments=30).of(objective)
    again = Supervoxels(n_segments=30).of(objective)
    assert torch.equal(features.labels, again.labels)
    inside = image[0] > 0
    inside[tuple(n // 2 for n in shape)] = True  # holes are filled
    assert torch.equal(features.labels[0] >= 0, inside)
    assert 15 <= len(features) <= 45
    assert features.counts.sum() == inside.sum()
    assert int(features.counts.min()) > 0
    # most voxels lie in supervoxels of one intensity
    parts = [image[0][features.labels[0] == j] for j in range(len(features))]
    assert sum(len(p) for p in parts if p.unique().numel() == 1) / int(inside.sum()) > 0.5


def test_supervoxels_of_a_coarse_copy_cover_the_same_voxels():
    image = phantom(31, 45)
    coarse = Supervoxels(n_segments=20, max_voxels=400).of(of(image))
    fine = Supervoxels(n_segments=20).of(of(image))
    assert torch.equal(coarse.labels >= 0, fine.labels >= 0)
    assert 10 <= len(coarse) <= 30


def test_supervoxels_everywhere_in_a_given_mask_or_in_an_image_without_foreground():
    image = phantom(20, 20)
    assert bool((Supervoxels(10, mask="everything").of(of(image)).labels >= 0).all())
    mask = torch.zeros(20, 20)
    mask[3:9, 3:17] = 5
    assert torch.equal(Supervoxels(10, mask=mask).of(of(image)).labels[0] >= 0, mask > 0)
    assert len(Supervoxels(4).of(of(torch.ones(1, 8, 8, dtype=torch.float64)))) >= 1
    with pytest.raises(InputError, match="no voxel above 0"):
        Supervoxels(10, mask=torch.zeros(20, 20)).of(of(image))


def test_multi_channel_supervoxels_see_an_edge_of_the_second_channel():
    image = torch.zeros(2, 16, 16, dtype=torch.float64)
    image[1, :, 8:] = 1
    features = Supervoxels(8, mask="everything").of(of(image)).labels[0]
    assert not set(features[:, :7].unique().tolist()) & set(features[:, 9:].unique().tolist())


def test_label_map_keeps_names_and_leaves_the_background_alone():
    labels = torch.tensor([[0, 0, 7, 7], [3, 3, 7, 0]])
    features = LabelMap(labels, names={3: "liver", "7": "spleen"}).of(of(noise(1, 2, 4)))
    assert features.names == ["liver", "spleen"]
    assert features.labels[0].tolist() == [[-1, -1, 1, 1], [0, 0, 1, -1]]
    assert LabelMap(labels, background=None).of(of(noise(1, 2, 4))).names == ["label 0", "label 3", "label 7"]
    assert features_for(labels).of(of(noise(1, 2, 4))).names == ["label 3", "label 7"]


def test_a_label_map_on_another_grid_is_moved():
    """Twice as fine, and shifted by one coarse voxel along the first axis."""
    objective = of(noise(1, 4, 4, 4))
    objective = objective.derive(case=Case(torch.eye(4, dtype=torch.float64)))
    fine = np.diag([0.5, 0.5, 0.5, 1.0])
    fine[:3, 3] = [0.75, -0.25, -0.25]  # voxel corners of the grids agree; one voxel off along x
    labels = torch.arange(8 * 8 * 8).reshape(8, 8, 8) // 64 + 1
    features = LabelMap(MetaTensor(labels[None], affine=torch.from_numpy(fine))).of(objective)
    slabs = [set(features.labels[0, i].unique().tolist()) for i in range(4)]
    assert slabs[0] == {-1}  # outside the map
    named = [[features.names[j] for j in s] for s in slabs[1:]]
    assert [n[0] in (f"label {2 * i + 1}", f"label {2 * i + 2}") for i, n in enumerate(named)] == [True] * 3


def test_a_key_of_the_data_and_a_file(tmp_path):
    import nibabel

    objective = of(noise(1, 2, 3, 4))
    labels = torch.arange(24).reshape(2, 3, 4) // 6
    objective = objective.derive(case=Case(torch.eye(4, dtype=torch.float64), {"organs": labels}))
    by_key = features_for("key:organs").of(objective)
    nibabel.save(nibabel.Nifti1Image(labels.numpy().astype(np.uint8), np.eye(4)), tmp_path / "organs.nii.gz")
    by_file = features_for(str(tmp_path / "organs.nii.gz")).of(objective)
    assert by_key.names == by_file.names == ["label 1", "label 2", "label 3"]
    assert torch.equal(by_key.labels, by_file.labels)
    with pytest.raises(InputError, match="neither a file nor a key"):
        features_for("key:bones").of(objective)


def test_what_is_refused():
    objective = of(noise(1, 4, 4))
    with pytest.raises(InputError, match="no affine"):
        LabelMap(torch.ones(5, 5)).of(objective)
    with pytest.raises(InputError, match="no label"):
        LabelMap(torch.zeros(4, 4)).of(objective)
    with pytest.raises(UsageError, match="above 0"):
        Grid(0).of(objective)
    with pytest.raises(EsegetaError, match="did you mean Supervoxels"):
        features_for("supervoxel")


def test_paint_spread_and_table():
    features = Features(torch.tensor([[[0, 0, -1, 1]]]), ["a", "b, c"])
    values = torch.tensor([[3.0, 5.0], [0.0, 1.0]])
    assert features.paint(values).tolist() == [[[[3, 3, 0, 5]]], [[[0, 0, 0, 1]]]]
    assert features.spread(values).tolist() == [[[[1.5, 1.5, 0, 5]]], [[[0, 0, 0, 1]]]]
    rows = features.table(values, error=values / 10)[0]
    assert table_csv(rows) == 'feature,value,voxels,error\na,3.0,2,0.30000001192092896\n"b, c",5.0,1,0.5\n'
    assert table_csv([]) == "feature,value\n"


def test_labels_that_float32_does_not_tell_apart_keep_apart_on_another_grid():
    """Atlases number regions up to 6e8; MONAI resamples in float32, which is exact up to 1.7e7."""
    image = MetaTensor(torch.rand(1, 6, 6, 6).double(), affine=torch.eye(4).double())
    objective = of(torch.as_tensor(image).as_subclass(torch.Tensor))
    objective = objective.derive(case=Case(affine=image.affine))
    labels = torch.zeros(1, 3, 3, 3, dtype=torch.int64)
    labels[:, 0], labels[:, 1] = 614_454_276, 614_454_277
    features = LabelMap(MetaTensor(labels, affine=torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0])))).of(objective)
    assert features.names == ["label 614454276", "label 614454277"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([[0.0, 1.0, 0.5]]), r"no whole numbers, such as 0\.5"),
        (torch.tensor([[0.0, 1.0, float("nan")]]), "no whole numbers, such as nan"),
        (torch.ones(2, 1, 3), "has 2 channels"),
    ],
)
def test_what_is_no_label_map_is_refused(labels, message):
    with pytest.raises(InputError, match=message):
        LabelMap(labels).of(of(noise(1, 1, 3)))


def test_label_maps_may_hold_floats_negative_numbers_and_be_arrays():
    objective = of(noise(1, 1, 4))
    features = LabelMap(torch.tensor([[0.0, -1.0, 2.0000001, 2.0]]), names={"2": "liver"}).of(objective)
    assert features.names == ["label -1", "liver"]
    assert features.labels.tolist() == [[[-1, 0, 1, 1]]]
    assert features_for(np.array([[1, 1, 2, 2]])).of(objective).counts.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LabelMap(torch.ones(1, 1), names={"liver": 1}), "give label value to name"),
        (lambda: LabelMap(torch.ones(1, 1), names=["liver"]), "give a mapping or None"),
        (lambda: Supervoxels(n_segments=0), "must be above 0"),
        (lambda: Supervoxels(compactness=0), "must be above 0"),
        (lambda: Supervoxels(max_voxels=0), "must be above 0"),
        (lambda: Grid(0).of(of(noise(1, 3, 4))), "does not fit an image of 2 axes"),
        (lambda: Grid((2, 2, 2)).of(of(noise(1, 3, 4))), "does not fit an image of 2 axes"),
        (lambda: Supervoxels(mask=torch.zeros(3, 4)).of(of(noise(1, 3, 4))), "no voxel above 0"),
    ],
)
def test_wrong_parameters(build, message):
    with pytest.raises(EsegetaError, match=message):
        build()


def test_a_mask_of_supervoxels_counts_above_zero_and_one_segment_is_the_mask():
    mask = torch.zeros(20, 22, dtype=torch.long)
    mask[5:15, 5:15], mask[:3] = 2, -1
    objective = of(phantom(20, 22))
    for n in (1, 4):
        features = Supervoxels(n_segments=n, mask=mask).of(objective)
        assert torch.equal(features.labels[0] >= 0, mask > 0)
    assert Supervoxels(n_segments=1).of(objective).names == ["supervoxel 1"]


def test_channels_are_called_as_the_case_calls_them():
    objective = of(noise(2, 4, 4))
    objective = objective.derive(case=Case(channel_names=["T1", "FLAIR"]))
    assert Channels().of(objective).names == ["T1", "FLAIR"]
    assert Grid(4, per_channel=True).of(objective).names == ["T1, box 0 0", "FLAIR, box 0 0"]
    objective = objective.derive(case=Case(channel_names=["T1"]))
    assert Channels().of(objective).names == ["channel 0", "channel 1"]


@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize(("step", "behind"), [(1, False), (2, False), (1, True), (2, True)])
def test_label_files_of_a_2d_image(size, step, behind, tmp_path):
    """They may keep a third axis of length 1; the image's affine may be that of its plane or of its file."""
    labels = np.arange(6).reshape(2, 3)
    whole = labels.repeat(4, 0).repeat(4, 1)
    stored = whole[::step, ::step].astype(np.int16)
    affine = np.diag([2.0 * step, 2.0 * step, 1.0, 1.0])
    affine[:2, 3] = step - 1  # the middle of a coarse voxel lies between fine ones
    nib.save(nib.Nifti1Image(stored[..., None] if behind else stored, affine), tmp_path / "labels.nii.gz")
    objective = of(noise(1, 8, 12))
    objective = objective.derive(case=Case(affine=torch.diag(torch.tensor([2.0, 2.0, 1.0, 1.0][:size])).double()))
    features = LabelMap(tmp_path / "labels.nii.gz", background=None).of(objective)
    assert torch.equal(features.labels[0], torch.from_numpy(whole))
    by_key = Case(affine=objective.case.affine, data={"atlas": str(tmp_path / "labels.nii.gz")})
    objective = objective.derive(case=by_key)
    assert torch.equal(features_for("key:atlas").of(objective).labels[0], torch.from_numpy(whole) - 1)


def test_a_volume_of_labels_is_none_of_a_slice():
    with pytest.raises(InputError, match=r"give one with 2 axes|has 3 channels"):
        LabelMap(torch.ones(1, 4, 5, 3)).of(of(noise(1, 4, 5)))


def test_supervoxels_are_found_once_for_an_image(monkeypatch):
    import skimage.segmentation

    calls = []
    slic = skimage.segmentation.slic
    monkeypatch.setattr(skimage.segmentation, "slic", lambda *a, **k: calls.append(1) or slic(*a, **k))
    spec, first, second = Supervoxels(4), of(phantom(20, 22)), of(phantom(20, 24))
    assert spec.of(first) is spec.of(first)
    assert spec.of(second).labels.shape == (1, 20, 24)
    assert len(calls) == 2
