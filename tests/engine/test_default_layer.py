"""The default layer is the last coarse one that the target depends on."""

from __future__ import annotations

import pytest
import torch
from monai.inferers import SimpleInferer, SlidingWindowInferer

from esegeta_monai.engine.default_layer import check_layer, default_layer, layer_shapes
from esegeta_monai.engine.network.state import frozen
from esegeta_monai.errors import MethodError, UsageError
from esegeta_monai.targets import ClassScore, MultiClassMask
from tests.networks import build
from tests.support.networks import Computed, coarse
from tests.support.objectives import objective, objective_of
from tests.support.tensors import noise


def test_layer_shapes_lists_all_that_run_and_leaves_no_hook():
    net = coarse(2)
    o, _ = objective(net, noise(1, 20, 13), SlidingWindowInferer((8, 8), 2, 0.5), [MultiClassMask(1)])
    with frozen(net):
        shapes = layer_shapes(o)
    assert [(s.name, s.kind, s.shape, s.grid, s.calls) for s in shapes] == [
        ("down", "Conv2d", (4, 4, 4), (4, 4, 4), 1),
        ("up", "ConvTranspose2d", (3, 8, 8), (3, 8, 8), 1),
        ("", "Coarse", (3, 8, 8), (3, 8, 8), 1),
    ]
    assert not any(m._forward_hooks for m in net.modules())


def test_calls_of_a_shared_layer_are_counted():
    case = build("SharedNet", 2)
    o, _ = objective(case.network, case.image[0], None, [MultiClassMask(1)])
    with frozen(case.network):
        calls = {s.name: s.calls for s in layer_shapes(o)}
    assert (calls["first"], calls["act"], calls["stem"]) == (2, 3, 1)


def test_a_class_token_is_looked_through():
    """After the last attention only the class token counts, so the default is the block before it."""
    case = build("ViT", 2)
    with torch.no_grad():
        logits = case.logits(case.image)[0]

    o, prediction = objective(Computed(lambda out: out[0], case.network), case.image[0], None, [ClassScore(1)])
    assert torch.equal(prediction, logits)
    with frozen(case.network):
        assert default_layer(o) == "network.blocks.0"


def test_a_network_without_gradients_inside_has_no_default_layer():
    class Inference(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = coarse(2)

        @torch.inference_mode()
        def forward(self, x):
            return self.inside(x)

    o, _ = objective(Inference(), noise(1, 16, 16), None, [MultiClassMask(1)])
    with frozen(o.model.network), pytest.raises(MethodError, match="depends on no layer"):
        default_layer(o)


def test_check_layer():
    net = coarse(2)
    o, _ = objective(net, noise(1, 16, 16), None, [MultiClassMask(1)])
    with frozen(net):
        assert check_layer(o, None) == "down"
        assert check_layer(o, "up") == "up"
        with pytest.raises(UsageError, match="near matches: down"):
            check_layer(o, "dwon")


@pytest.mark.parametrize("ndim", [2, 3])
def test_the_default_layer_is_found_in_one_pass(ndim):
    net = coarse(ndim)
    o, _ = objective(net, noise(1, *(16,) * ndim), None, [MultiClassMask(1)])
    with frozen(net):
        assert default_layer(o) == "down"
        assert o.context.progress.passes == 1
        assert default_layer(o) == "down"
        assert o.context.progress.passes == 1


def test_a_layer_that_is_written_into_is_looked_at_alone():
    """The gradient of what was written over it would tell of another layer: of one that the target depends on."""

    class Overwritten(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Conv2d(1, 3, 3, 2, 1), torch.nn.Conv2d(1, 3, 3, 2, 1)

        def forward(self, x):
            kept = self.first(x)
            gone = self.second(x)
            gone.zero_().add_(kept)  # nothing of the second is left, but its tensor lies on the path
            return torch.nn.functional.interpolate(gone, scale_factor=2)

    net = Overwritten().eval().double()
    o, _ = objective(net, noise(1, 16, 16), None, [MultiClassMask(1)])
    with frozen(net):
        assert default_layer(o) == "first"


def test_a_layer_that_returns_its_input_is_read_alone():
    class Handed(torch.nn.Module):
        def forward(self, x):
            return x

    class Beside(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.beside = torch.nn.Conv2d(1, 3, 3, 2, 1), Handed()

        def forward(self, x):
            low = self.down(x)
            self.beside(low)  # used by nobody, though its output is the tensor that the target depends on
            return torch.nn.functional.interpolate(low, scale_factor=2)

    net = Beside().eval().double()
    o, _ = objective(net, noise(1, 16, 16), None, [MultiClassMask(1)])
    with frozen(net):
        assert default_layer(o) == "down"


def test_a_target_that_no_coarsest_layer_reaches_has_a_finer_one():
    """As the first output of a U-Net++ with deep supervision, which ends one step down."""

    class TwoEnds(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.fourth = torch.nn.Conv2d(1, 3, 3, 2, 1), torch.nn.Conv2d(3, 3, 3, 2, 1)

        def forward(self, x):
            half = self.second(x)
            up = torch.nn.functional.interpolate
            return up(half, scale_factor=2), up(self.fourth(half), scale_factor=4)

    net = TwoEnds().eval().double()
    for output, layer in ((0, "second"), (1, "fourth")):
        image = noise(1, 16, 16)
        o = objective_of(net, image, [MultiClassMask(1)], SimpleInferer(), output)
        with frozen(net):
            assert default_layer(o) == layer
