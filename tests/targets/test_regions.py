"""Targets that are a place."""

from __future__ import annotations

import pytest
import torch

from esegeta_monai.errors import TargetError, UsageError
from esegeta_monai.targets import Box, Case, Component, Errors, LabelMask, OutputValue, Voxel
from tests.support.tensors import noise

AFFINE = torch.tensor([[-2.0, 0, 0, 10], [0, 0, 3, -5], [0, 1.5, 0, 2], [0, 0, 0, 1]], dtype=torch.float64)
SHAPE = (8, 9, 7)


def full(score, shape=SHAPE) -> torch.Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[score.box] = score.mask
    return mask


def world(*voxel: float) -> list[float]:
    return (AFFINE @ torch.tensor([*voxel, 1.0], dtype=torch.float64))[:3].tolist()


def blobs() -> torch.Tensor:
    """A prediction with components of 8, 2 and 1 voxels of class 1."""
    p = torch.zeros(2, *SHAPE, dtype=torch.float64)
    p[0] += 1
    p[1, :2, :2, :2] = 2
    p[1, 6, 6, 5:7] = 2
    p[1, 4, 4, 4] = 2
    return p


@pytest.mark.parametrize(("which", "voxels"), [("largest", 8), (1, 8), (2, 2), (3, 1), (4, 0)])
def test_component_by_rank(which, voxels):
    (score,) = Component(1, which).bind(blobs(), Case())
    assert score.voxels == voxels
    assert score.empty == (voxels == 0)


def test_component_by_world_coordinate():
    case = Case(affine=AFFINE)
    inside = full(Component(1, world(6, 6, 5)).bind(blobs(), case)[0])
    assert inside[6, 6, 5]
    assert inside.sum() == 2
    near = full(Component(1, world(4, 5, 4)).bind(blobs(), case)[0])  # 1.5 mm off
    assert near[4, 4, 4]
    assert Component(1, world(4, 8, 0), max_distance=1.0).bind(blobs(), case)[0].empty
    with pytest.raises(TargetError, match="MetaTensor with an affine"):
        Component(1, [0, 0, 0]).bind(blobs(), Case())


def test_corners_connect():
    p = torch.zeros(1, 4, 4)
    p -= 1
    p[0, 0, 0] = p[0, 1, 1] = p[0, 2, 2] = 1
    assert Component(0).bind(p, Case())[0].voxels == 3


@pytest.mark.parametrize("which", ["smallest", 0, -1])
def test_component_words(which):
    with pytest.raises(TargetError, match="give 'largest'"):
        Component(1, which).bind(blobs(), Case())


def test_voxel_by_index_and_world_are_the_same():
    p, case = noise(3, *SHAPE), Case(affine=AFFINE)
    (by_index,), (by_world,) = (
        Voxel(1, index=(3, 4, 2)).bind(p, case),
        Voxel(1, world=world(3.3, 4.2, 1.8)).bind(p, case),
    )
    assert by_index.box == by_world.box == (slice(3, 4), slice(4, 5), slice(2, 3))
    assert float(by_index.value(by_index.crop(p))) == float(p[1, 3, 4, 2])
    (predicted,) = Voxel(index=(3, 4, 2)).bind(p, case)
    assert predicted.class_index == int(p[:, 3, 4, 2].argmax())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either world"),
        ({"index": (1, 1, 1), "world": (0, 0, 0)}, "either world"),
        ({"index": (8, 0, 0)}, "is outside"),
        ({"index": (-1, 0, 0)}, "is outside"),
        ({"index": (1, 1)}, "is outside"),
    ],
)
def test_voxel_errors(options, message):
    with pytest.raises(TargetError, match=message):
        Voxel(1, **options).bind(noise(3, *SHAPE), Case(affine=AFFINE))


def test_box_in_voxels_and_in_the_world():
    p, case = noise(2, *SHAPE), Case(affine=AFFINE)
    (score,) = Box(0, (1, 2, 3), (4, 5, 20)).bind(p, case)
    assert score.box == (slice(1, 4), slice(2, 5), slice(3, 7))
    assert float(score.value(score.crop(p))) == pytest.approx(float(p[0, 1:4, 2:5, 3:7].sum()))
    (same,) = Box(0, world(1, 2, 3), world(3, 4, 6), world=True).bind(p, case)
    assert same.box == (slice(1, 4), slice(2, 5), slice(3, 7))  # both corners lie inside
    assert Box(0, (9, 0, 0), (12, 2, 2)).bind(p, case)[0].empty
    assert Box(0, (-4, -4, -4), (0, 0, 0)).bind(p, case)[0].empty
    with pytest.raises(TargetError, match="corners of 3"):
        Box(0, (0, 0), (1, 1)).bind(p, case)
    with pytest.raises(TargetError, match="affine"):
        Box(0, (0, 0, 0), (1, 1, 1), world=True).bind(p, Case())


@pytest.mark.parametrize("kind", ["false_positive", "false_negative"])
def test_errors_against_a_label(kind):
    p, labels = noise(3, *SHAPE), (3 * torch.rand(SHAPE, generator=torch.Generator().manual_seed(0))).long()
    predicted = p.argmax(0)
    (score,) = Errors(labels, kind, 1).bind(p, Case())
    wrong = (predicted == 1) & (labels != 1) if kind == "false_positive" else (labels == 1) & (predicted != 1)
    assert torch.equal(full(score), wrong)
    (none,) = Errors(predicted, kind, 1).bind(p, Case())
    assert none.empty


def test_errors_of_a_network_with_one_channel():
    p = noise(1, *SHAPE)
    labels = (noise(*SHAPE).flip(0) > 0).long()
    (score,) = Errors(labels, "false_negative", 0).bind(p, Case())
    assert torch.equal(full(score), (labels > 0) & (p[0] <= 0))
    with pytest.raises(UsageError, match="give 'false_positive' or 'false_negative'"):
        Errors(labels, "wrong", 0)


def test_output_value():
    p = noise(2, *SHAPE)
    (score,) = OutputValue(1, reference=0.5).bind(p, Case())
    assert float(score.value(score.crop(p))) == pytest.approx(float(p[1].mean()) - 0.5)
    (single,) = OutputValue(0, reference=40.0).bind(torch.tensor([55.0]), Case())
    assert float(single.value(torch.tensor([55.0]))) == 15.0
    with pytest.raises(TargetError, match="channel=2"):
        OutputValue(2).bind(p, Case())


@pytest.mark.parametrize(
    "target", [LabelMask(torch.ones(3), label=1), Component(1), Voxel(1, index=(0,)), Box(1, (0,), (1,))]
)
def test_places_need_a_prediction_with_voxels(target):
    with pytest.raises(TargetError, match="needs a prediction with voxels"):
        target.bind(torch.zeros(3), Case())
