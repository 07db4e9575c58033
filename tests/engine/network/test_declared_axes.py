"""Axes of layers that the user states: parsing, and maps equal to those of a network whose axes are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.engine.network.declared_axes import DeclaredAxes, layer_axes_of
from esegeta_monai.errors import EsegetaError, MethodError, UsageError
from esegeta_monai.methods import GradCam, LayerActivation, LayerIntegratedGradients
from esegeta_monai.targets import ClassScore, LayerNeuron


class Rearrange(nn.Module):
    """Returns the values of its input in another order, by an index that no trace can follow if ``hidden``."""

    def __init__(self, order: str, hidden: bool) -> None:
        super().__init__()
        self.order, self.hidden = order, hidden
        self.token = nn.Parameter(torch.zeros(1, 1, 3))

    def arrange(self, x: Tensor) -> Tensor:
        if self.order == "last":
            return x.movedim(1, -1)
        if self.order == "mirrored":
            return x.flip(2)
        tokens = x.flatten(2).transpose(1, 2)
        token = self.token.to(x.dtype)  # a class token of zeros
        return torch.cat([token.expand(len(x), -1, -1), tokens], 1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.hidden:
            return self.arrange(x)
        index = self.arrange(torch.arange(1, x.numel() + 1, device=x.device).view_as(x))
        values = torch.cat([x.new_zeros(1), x.flatten()])
        return values[index.flatten()].view(index.shape)


class Network(nn.Module):
    def __init__(self, order: str, hidden: bool, dims: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = (nn.Conv3d if dims == 3 else nn.Conv2d)(1, 3, 3, padding=1)
        self.block, self.order, self.head = Rearrange(order, hidden), order, nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(self.conv(x)).tanh()
        y = y.movedim(1, -1) if self.order == "mirrored" else y
        weights = torch.arange(y[0, ..., 0].numel(), dtype=y.dtype).view(y.shape[1:-1])[..., None].cos()
        return self.head((y * weights).flatten(1, -2).mean(1))


PATTERNS = {
    ("last", 3): "n x y z c",
    ("last", 2): "n x y c",
    ("tokens", 3): "n 1+(x=5 y=4 z=3) c",
    ("mirrored", 3): "n c -x y z",
}


@pytest.mark.parametrize(("order", "dims"), PATTERNS)
@pytest.mark.parametrize("method", [GradCam, LayerActivation, LayerIntegratedGradients])
def test_maps_with_stated_axes_equal_those_of_known_axes(order: str, dims: int, method: Any) -> None:
    image = torch.rand(1, 1, *(5, 4, 3)[:dims], generator=torch.Generator().manual_seed(1))
    maps = {}
    for hidden in (False, True):
        network = Network(order, hidden, dims).double().eval()
        if hidden:
            with pytest.raises(MethodError, match=r"state its axes.*--layer-axes"):
                list(Explainer(network)(image, [method(layer="block")], [ClassScore(1)]))
        axes = {"block": PATTERNS[order, dims]} if hidden else None
        (maps[hidden],) = Explainer(network, layer_axes=axes)(image, [method(layer="block")], [ClassScore(1)])
    assert maps[True].map.abs().max() > 0
    torch.testing.assert_close(maps[True].map, maps[False].map, rtol=0, atol=0)
    assert maps[True].record["layer_axes"] == {"block": PATTERNS[order, dims]}


def test_a_unit_of_the_layer_is_a_target_too() -> None:
    image = torch.rand(1, 1, 5, 4, 3, generator=torch.Generator().manual_seed(1))
    target = LayerNeuron("block", 1, index=(3, 1, 2))
    (known,) = Explainer(Network("last", False).double().eval())(image, ["Saliency"], [target])
    hidden = Explainer(Network("last", True).double().eval(), layer_axes={"block": "n x y z c"})
    (stated,) = hidden(image, ["Saliency"], [target])
    assert known.map.abs().max() > 0
    torch.testing.assert_close(stated.map, known.map, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ("n x y c", "do not fit the output's 5 axes"),
        ("n 1 x y c", "do not fit a window of 3 spatial axes"),
        ("n c x y z", r"axis 2 has 4 entries, not"),
    ],
)
def test_axes_that_do_not_fit_are_refused(axes: str, message: str) -> None:
    image = torch.rand(1, 1, 5, 4, 3)
    if axes == "n c x y z":  # its lengths are those of the output, so only a group can contradict them
        axes = "n x (y=3) z c"
    with pytest.raises(EsegetaError, match=message):
        list(
            Explainer(Network("last", True).eval(), layer_axes={"block": axes})(
                image, [GradCam("block")], [ClassScore(1)]
            )
        )


def test_axes_that_contradict_the_network_s_own_are_refused() -> None:
    image = torch.rand(1, 1, 5, 4, 3)
    explainer = Explainer(Network("last", False).eval(), layer_axes={"block": "n y x z c"})
    with pytest.raises(EsegetaError, match=r"axes 'n y x z c' give the map .*own operations show"):
        list(explainer(image, [GradCam("block")], [ClassScore(1)]))


@pytest.mark.parametrize(
    "axes", ["", "n", "n c", "n x x c", "n x y", "x n y c", "n (x y) c", "n h w c", "n x 2+(y=2 c"]
)
def test_patterns_that_cannot_be_read_are_refused(axes: str) -> None:
    with pytest.raises(UsageError, match=r"cannot be read.*examples"):
        DeclaredAxes(axes)
    with pytest.raises(UsageError):
        layer_axes_of({"block": axes})


def test_several_windows_in_one_axis_with_the_positions() -> None:
    """Windows that are stacked along an axis of slices, as recurrent networks over slices do it."""
    frame = DeclaredAxes("(n x=3) c y z").frame("block", (2, 4, 5), 3)
    values = torch.rand(2, 3, 2, 4, 5)
    assert torch.equal(frame.to_map(values.flatten(0, 1)), values.transpose(1, 2))
