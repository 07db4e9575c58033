"""The most relevant channels of a layer, on a network with two planted causes, and against relevance by channel."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from torch import nn

from esegeta_monai import Explainer
from esegeta_monai.explain.concepts import case_concepts, channel_region, effective_box, ranked_channels
from esegeta_monai.methods import ConceptRelevance
from esegeta_monai.targets import MultiClassMask
from tests.support.networks import CONV
from tests.support.tensors import DOUBLE, noise


class Planted(nn.Module):
    """Class 1 where the image is above 1: bright voxels of input channel 0 count by layer channel 1, those of input
    channel 1 by layer channel 2; layer channel 0 is not used."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        conv = CONV[dims]
        self.layer, self.act, self.head = conv(2, 3, 3, padding=1), nn.ReLU(), conv(3, 2, 1)
        with torch.no_grad():
            for p in self.parameters():
                p.zero_()
            middle = (1,) * dims
            self.layer.weight[(0, 0, *middle)] = 1
            self.layer.weight[(1, 0, *middle)] = self.layer.weight[(2, 1, *middle)] = 1
            self.head.weight[1, 1] = self.head.weight[1, 2] = 1
            self.head.bias[1] = -1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.layer(x)))


def scan(dims: int, channel: int, at: int) -> MetaTensor:
    """A bright voxel in one input channel, with 2 mm voxels; ``at`` < 0: a dark one."""
    x = torch.zeros(1, 2, *[12] * dims, dtype=DOUBLE)
    x[(0, channel, *[at] * dims)] = 3 if at >= 0 else 0.5
    return MetaTensor(x, affine=torch.diag(torch.tensor([2.0] * dims + [1.0] * (4 - dims))).double())


@pytest.mark.parametrize("dims", [2, 3])
def test_planted_causes_are_found_in_their_channels_and_places(dims):
    explainer = Explainer(Planted(dims).double(), SlidingWindowInferer((8,) * dims, 2, 0.5), checks=False)
    cases = {"a": scan(dims, 0, 3), "b": scan(dims, 0, 9), "c": scan(dims, 1, 5), "none": scan(dims, 0, -1)}
    targets = [MultiClassMask(1)]
    entries = [e for name, x in cases.items() for e in case_concepts(explainer, x, name, targets, "act")]
    assert [e.case for e in entries] == ["a", "b", "c"]  # the target of the last is empty
    assert [int(e.share.argmax()) for e in entries] == [1, 1, 2]
    assert [(c, round(s, 6)) for c, s in ranked_channels(entries, 3)] == [(1, 0.666667), (2, 0.333333), (0, 0.0)]
    region = channel_region(explainer, cases["c"], targets, entries[2], 2)
    assert region.concepts.peaks[2].tolist() == [5] * dims
    assert all(b.start <= 5 < b.stop for b in region.box)
    assert region.size == tuple(2.0 * (b.stop - b.start) for b in region.box)
    assert max(region.size) <= 6  # the layer sees 3 voxels of 2 mm
    place = tuple([slice(None), *[slice(4, 7)] * dims])
    assert float(region.map[place].sum()) == pytest.approx(float(region.map.sum()), rel=1e-9)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_relevance_of_a_channel_is_that_of_its_map_and_of_biases_below(dims):
    torch.manual_seed(dims)
    conv = CONV[dims]
    net = nn.Sequential(conv(1, 4, 3, padding=1), nn.ReLU(), conv(4, 3, 3, padding=1)).double().eval()
    image = noise(1, 1, *[10] * dims)
    with torch.no_grad():
        net[2].bias -= net(image).mean((0, *range(2, dims + 2)))
    explainer = Explainer(net, SlidingWindowInferer((8,) * dims, 2, 0.5, "gaussian"), checks=False)
    (entry,) = case_concepts(explainer, MetaTensor(image), "a", [MultiClassMask(1)], "1")
    for channel in range(4):
        (through,) = explainer(image, [ConceptRelevance("1", channel)], [MultiClassMask(1)])
        total = float(through.map.sum()) + through.record["booked"]
        assert float(entry.relevance[channel]) == pytest.approx(total, rel=1e-8)
    assert float(entry.share.sum()) == pytest.approx(1, abs=1e-12)


def test_the_box_holds_the_stated_share_and_a_smaller_one_does_not():
    gradient = torch.ones(9, 9)
    box = effective_box(gradient, [4, 4])
    assert float(gradient[box].sum()) >= 0.9 * 81
    inner = tuple(slice(b.start + 1, b.stop - 1) for b in box)
    assert float(gradient[inner].sum()) < 0.9 * 81
    assert effective_box(gradient, [0, 8])[0].start == 0
