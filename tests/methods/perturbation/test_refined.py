"""Occlusion from large boxes to small ones, against the full fine map."""

from __future__ import annotations

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.errors import UsageError
from esegeta_monai.methods import Occlusion
from esegeta_monai.targets import Box


class Small(nn.Module):
    """A network that reacts to bright voxels beyond a threshold, so that effects are not additive."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims](2, 2, 3, padding=1).double()
        self.conv.weight.data.abs_()  # bright voxels raise the output

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu() ** 2


def image_of(dims: int) -> Tensor:
    """A dark image (1, 2, *spatial) with a bright lesion, whose shape is no multiple of the boxes."""
    image = 0.01 * torch.rand(1, 2, *((40, 37) if dims == 2 else (22, 19, 17)), dtype=torch.float64)
    image[(..., *(slice(5, 8),) * dims)] += 1
    return image


@pytest.mark.parametrize("dims", [2, 3])
def test_the_map_is_the_fine_one_where_it_says_so(dims: int) -> None:
    torch.manual_seed(0)
    explainer, image = Explainer(Small(dims), SlidingWindowInferer((12,) * dims, 2, 0.25)), image_of(dims)
    target = [Box(1, (0,) * dims, image.shape[2:])]
    (fine,) = explainer(image, [Occlusion(3, baseline="zero")], target)
    (coarse,) = explainer(image, [Occlusion(3, baseline="zero", refine=4)], target)
    exact = torch.zeros_like(fine.map.as_tensor(), dtype=torch.bool)
    for place in coarse.record["exact_boxes"]:
        exact[(..., *(slice(a, b) for a, b in place))] = True
    a, b = fine.map.as_tensor(), coarse.map.as_tensor()
    assert exact.any()
    assert not exact.all()
    assert coarse.record["exact_share"] == pytest.approx(float(exact.double().mean()))
    assert (a - b)[exact].abs().max() <= 1e-10 * a.abs().max()
    assert bool(exact.flatten()[a.abs().argmax()])
    assert coarse.record["occluders"] < fine.record["occluders"]
    assert coarse.record["window_passes"] < fine.record["window_passes"]


def test_a_box_that_is_not_divided_has_the_mean_of_its_effect() -> None:
    torch.manual_seed(0)
    explainer, image, target = Explainer(Small(2)), image_of(2), [Box(1, (0, 0), (40, 37))]
    (large,) = explainer(image, [Occlusion(4, baseline="zero")], target)
    (both,) = explainer(image, [Occlusion(2, baseline="zero", refine=2)], target)
    a, b = large.map.as_tensor()[0], both.map.as_tensor()[0]
    exact = torch.zeros(a.shape, dtype=torch.bool)
    for place in both.record["exact_boxes"]:
        exact[tuple(slice(*ends) for ends in place)] = True
    kept = ~exact
    kept[:, 36:] = False  # boxes of other sizes at the border of 37 voxels hold fewer occluders
    assert kept.any()
    assert (a / 4 - b)[kept].abs().max() <= 1e-10 * a.abs().max()


def test_all_boxes_are_divided_at_the_smallest_share() -> None:
    torch.manual_seed(0)
    explainer, image = Explainer(Small(2)), torch.rand(1, 2, 10, 7, dtype=torch.float64)
    (fine,) = explainer(image, [Occlusion(2, baseline="zero")], ["MultiClassMask(1)"])
    (coarse,) = explainer(image, [Occlusion(2, baseline="zero", refine=2, refine_above=1e-9)], ["MultiClassMask(1)"])
    assert (fine.map - coarse.map).as_tensor().abs().max() <= 1e-10 * fine.map.as_tensor().abs().max()


def test_a_map_of_added_effects_keeps_its_sum() -> None:
    """A linear network: each box that is not divided has the mean effect of its occluders."""
    torch.manual_seed(0)
    network = nn.Conv2d(1, 2, 1, bias=False).double()
    image = torch.rand(1, 1, 16, 16, dtype=torch.float64)
    explainer = Explainer(network)
    maps = [
        explainer(image, [Occlusion(2, baseline="zero", **more)], ["Box(class_index=1, start=(0, 0), stop=(16, 16))"])[
            0
        ].map.as_tensor()
        for more in ({}, {"refine": 4, "refine_above": 1.0})
    ]
    assert float(maps[0].sum() - maps[1].sum()) == pytest.approx(0, abs=1e-10 * float(maps[0].abs().sum()))
    assert (maps[0] - maps[1]).abs().max() > 0


@pytest.mark.parametrize(
    "wrong", [{"refine": 3}, {"refine": 1}, {"refine": 2, "stride": 1}, {"refine": 2, "per_channel": True}]
)
def test_wrong_values_are_refused(wrong: dict) -> None:
    with pytest.raises(UsageError, match="refine"):
        Occlusion(4, **wrong)
