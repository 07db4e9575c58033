"""Saliency and InputXGradient: on a linear network the weights, on one window Captum, on many full autograd."""

from __future__ import annotations

import pytest
import torch
from captum.attr import InputXGradient as CaptumInputXGradient
from captum.attr import Saliency as CaptumSaliency
from monai.inferers import SlidingWindowInferer
from torch import nn

from esegeta_monai.engine.network.state import frozen
from esegeta_monai.methods import METHODS, GradTimesImage, InputXGradient, Saliency, VanillaBackprop, run, run_together
from esegeta_monai.targets import ClassScore, MultiClassMask, TargetWrapper, Voxel, WeightedScore
from tests.networks import build
from tests.support.networks import network
from tests.support.objectives import full_gradient, objective
from tests.support.tensors import assert_equal, noise

SHAPE = {2: (12, 10), 3: (8, 7, 9)}


@pytest.mark.parametrize("dims", [2, 3])
def test_on_a_linear_network_the_map_is_the_weights(dims):
    shape = (2, *SHAPE[dims])
    net = nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), 3)).double()
    image = noise(*shape)
    o, _ = objective(net, image, None, [ClassScore(c) for c in range(3)])
    weights = net[1].weight.detach().reshape(3, *shape)
    with frozen(net):
        assert torch.equal(run(Saliency(abs=False), o).maps, weights)
        assert torch.equal(run(Saliency(), o).maps, weights.abs())
        product = run(InputXGradient(), o)
    assert torch.equal(product.maps, weights * image)
    # complete on a linear network: the sum is F(x) − F(0)
    assert_equal(product.maps.flatten(1).sum(1), o.image_values() - net[1].bias.detach())


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", ["UNet_instance", "SegResNet", "ResNet18"])
def test_one_window_equals_captum(name, dims):
    case = build(name, dims)
    target = ClassScore(1) if case.kind == "classification" else MultiClassMask(1)
    wrapper = TargetWrapper(case.network, target).freeze(case.image)
    o, _ = objective(case.network, case.image[0], None, [target])
    with frozen(case.network):
        maps = [run(m, o).maps[0] for m in (Saliency(), VanillaBackprop(), InputXGradient())]
    assert_equal(maps[0], CaptumSaliency(wrapper).attribute(case.image.clone(), target=0)[0])
    assert_equal(maps[1], CaptumSaliency(wrapper).attribute(case.image.clone(), target=0, abs=False)[0])
    assert_equal(maps[2], CaptumInputXGradient(wrapper).attribute(case.image.clone(), target=0)[0].detach())


def test_float32_keeps_to_its_tolerance():
    net = network(3, 1, torch.float32)
    image = noise(1, 12, 9, 10).float()
    inferer = SlidingWindowInferer((8, 8, 8), 3, 0.5, "gaussian")
    o, _ = objective(net, image, inferer, [MultiClassMask(1)])
    with frozen(net):
        maps = run(Saliency(abs=False), o).maps
    assert maps.dtype == torch.float32
    assert_equal(maps[0], full_gradient(net, image, inferer, o.scores[0]))


def test_abs_is_taken_of_the_sum_over_windows():
    net, image = network(2, 1), noise(1, 20, 18)
    inferer = SlidingWindowInferer((8, 8), 3, 0.5, "gaussian")
    o, _ = objective(net, image, inferer, [MultiClassMask(1)])
    with frozen(net):
        signed, absolute = run(Saliency(abs=False), o).maps, run(Saliency(), o).maps
    assert torch.equal(absolute, signed.abs())
    assert bool((signed < 0).any())


def test_the_share_of_padding_with_a_value_is_recorded():
    net, image = network(2, 2), noise(2, 6, 20)
    inferer = SlidingWindowInferer((8, 8), 3, 0.5, "gaussian", cval=0.7)
    o, _ = objective(net, image, inferer, [MultiClassMask(1)])
    with frozen(net):
        absorbed = run(InputXGradient(), o).note(0)["sum_in_padding"]
    padded = torch.nn.functional.pad(image, (0, 0, 1, 1), value=0.7)
    rows, columns = o.scores[0].box
    mask = torch.zeros(8, 20, dtype=torch.bool)
    mask[rows.start + 1 : rows.stop + 1, columns] = o.scores[0].mask
    product = full_gradient(net, padded, inferer, WeightedScore(mask, 1, 3)) * padded
    outside = product[:, [0, 7]]
    assert float(outside.abs().sum()) > 0
    assert_equal(torch.tensor([absorbed], dtype=torch.float64), outside.sum().reshape(1))


def test_methods_share_one_sweep():
    net, image = network(2, 1), noise(1, 20, 18)
    o, _ = objective(net, image, SlidingWindowInferer((8, 8), 3, 0.5), [MultiClassMask(1), Voxel(0, index=(3, 3))])
    with frozen(net):
        together = run_together([Saliency(), InputXGradient(), VanillaBackprop()], o)
        passes = o.context.progress.passes
        alone = [run(m, o).maps for m in (Saliency(), InputXGradient(), VanillaBackprop())]
    assert passes == len(o.windows) == Saliency().passes(o)
    for i, maps in enumerate(alone):
        assert torch.equal(together[i].result.maps, maps)


def test_aliases_and_signs():
    assert METHODS.get("grad-times-image") is InputXGradient is GradTimesImage
    assert Saliency.additive is False
    assert InputXGradient.additive is True
    assert VanillaBackprop().signed
    assert not Saliency().signed
