"""LayerActivation equals a naive blend of the windows' activations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from monai.inferers import SliceInferer, SlidingWindowInferer
from torch import nn

from esegeta_monai.engine.network.state import frozen
from esegeta_monai.errors import MethodError, UsageError
from esegeta_monai.methods import LayerActivation, run
from esegeta_monai.methods.layer.activation import reduce_channels
from esegeta_monai.targets import ClassScore, MultiClassMask, Voxel
from tests.networks import build
from tests.support.networks import Computed, coarse, network
from tests.support.objectives import objective
from tests.support.tensors import assert_equal, noise


class Layer(nn.Module):
    """The layer's activations, upsampled to the window, as a network that MONAI can blend."""

    def __init__(self, network: nn.Module, layer: str) -> None:
        super().__init__()
        self.network, self.layer = network, layer

    def forward(self, x):
        kept = []
        handle = self.network.get_submodule(self.layer).register_forward_hook(lambda m, i, o: kept.append(o.clone()))
        self.network(x)
        handle.remove()
        if kept[0].shape[2:] == x.shape[2:]:
            return kept[0]
        mode = {4: "bilinear", 5: "trilinear"}[x.ndim]
        return F.interpolate(kept[0], size=x.shape[2:], mode=mode, align_corners=False)


@pytest.mark.parametrize("mode", ["constant", "gaussian"])
@pytest.mark.parametrize(("dims", "shape"), [(2, (20, 13)), (2, (6, 20)), (3, (10, 9, 8)), (3, (5, 12, 7))])
def test_equals_the_naive_blend(dims, shape, mode):
    net, image = coarse(dims), noise(1, *shape)
    inferer = SlidingWindowInferer((8,) * dims, 3, 0.5, mode)
    o, _ = objective(net, image, inferer, [Voxel(1, index=(1,) * dims), MultiClassMask(2)])
    with torch.no_grad():
        naive = inferer(image[None], Layer(net, "down"))[0]
    reductions = {
        "channels": naive,
        "sum": naive.sum(0, keepdim=True),
        "mean": naive.mean(0, keepdim=True),
        "abs": naive.abs().sum(0, keepdim=True),
        "positive": naive.clamp(min=0).sum(0, keepdim=True),
    }
    for reduce, reference in reductions.items():
        with frozen(net):
            explained = run(LayerActivation("down", reduce=reduce), o)
        assert explained.notes["layer"] == "down"
        for one in explained.maps:  # the same for every target, also outside the windows that the first one sees
            assert_equal(one, reference)


def test_a_layer_at_full_resolution_is_not_interpolated():
    net, image = network(3, 1), noise(1, 10, 9, 8)
    inferer = SlidingWindowInferer((8, 8, 8), 3, 0.25, "gaussian")
    o, _ = objective(net, image, inferer, [MultiClassMask(1)])
    with torch.no_grad():
        naive = inferer(image[None], Layer(net, "a"))[0]
    with frozen(net):
        assert_equal(run(LayerActivation("a", reduce="channels"), o).maps[0], naive)


def test_slice_inferer():
    net, image = coarse(2), noise(1, 12, 9, 5)
    inferer = SliceInferer(roi_size=(8, 8), sw_batch_size=2, spatial_dim=2, overlap=0.5)
    o, _ = objective(net, image, inferer, [MultiClassMask(1)])
    with torch.no_grad():
        naive = inferer(image[None], Layer(net, "down"))[0]
    with frozen(net):
        assert_equal(run(LayerActivation("down", reduce="channels"), o).maps[0], naive)


def test_tokens_come_on_their_grid():
    case = build("ViTAutoEnc", 2)
    o, _ = objective(Computed(lambda out: out[0], case.network), case.image[0], None, [MultiClassMask(1)])
    with frozen(case.network), torch.no_grad():
        result = run(LayerActivation("network.blocks.0", reduce="channels"), o).maps[0]
        kept = []
        handle = case.network.blocks[0].register_forward_hook(lambda m, i, o: kept.append(o.clone()))
        case.network(case.image)
        handle.remove()
    tokens = kept[0][0]
    side = int(len(tokens) ** 0.5)
    grid = torch.stack([tokens[i * side : (i + 1) * side] for i in range(side)]).permute(2, 0, 1)
    assert_equal(result, F.interpolate(grid[None], size=case.roi, mode="bilinear", align_corners=False)[0])


def test_channels_that_come_last_are_turned_round():
    case = build("SwinUNETR", 2)
    o, _ = objective(case.network, case.image[0], None, [MultiClassMask(1)])
    with frozen(case.network):
        maps = run(LayerActivation("swinViT.layers1.0.blocks.0", reduce="channels"), o).maps
    assert maps.shape[1] == 12


def test_errors_name_the_way_out():
    case = build("ResNet18", 2)
    o, _ = objective(case.network, case.image[0], None, [ClassScore(1)])
    with frozen(case.network):
        with pytest.raises(UsageError, match="near matches: layer1"):
            run(LayerActivation("layer_1"), o)
        with pytest.raises(MethodError, match="no spatial map"):
            run(LayerActivation("fc"), o)
    with pytest.raises(UsageError, match="layer=3: give text or None"):
        LayerActivation(3)
    with pytest.raises(UsageError, match="reduce"):
        LayerActivation(reduce="max")


def test_reduce_channels_along_another_axis():
    values = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    assert reduce_channels(values, "abs", axis=1).tolist() == [[3.0], [7.0]]
    assert reduce_channels(values, "positive", axis=1).tolist() == [[1.0], [7.0]]
    assert reduce_channels(values, "channels", axis=1) is values
