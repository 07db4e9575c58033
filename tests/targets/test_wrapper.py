"""TargetWrapper under Captum gives what our methods give, and never the zero gradient of counted voxels."""

from __future__ import annotations

import pytest
import torch
from captum.attr import InputXGradient as CaptumInputXGradient
from captum.attr import IntegratedGradients as CaptumIntegratedGradients
from captum.attr import Saliency as CaptumSaliency
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from torch import nn

from esegeta_monai.engine.network.state import frozen
from esegeta_monai.errors import TargetError
from esegeta_monai.methods import InputXGradient, IntegratedGradients, Saliency, run
from esegeta_monai.targets import Box, ClassScore, MultiClassMask, TargetWrapper, ThresholdMask, Voxel
from tests.networks import build
from tests.support.networks import Computed, network
from tests.support.objectives import objective
from tests.support.tensors import assert_equal, noise

INFERER = SlidingWindowInferer((8, 8), 3, 0.5, "gaussian")


@pytest.mark.parametrize("output", ["logit", "probability"])
@pytest.mark.parametrize("inferer", [INFERER, None], ids=["windows", "whole"])
def test_captum_on_the_wrapper_equals_our_methods(inferer, output, captum_in_float64):
    net, image = network(2, 2), noise(2, 13, 10)
    targets = [MultiClassMask(1, output=output), Voxel(2, index=(3, 4), output=output)]
    wrapper = TargetWrapper(net, targets, inferer).freeze(image[None])
    o, _ = objective(net, image, inferer, targets)
    captum = {
        "saliency": CaptumSaliency(wrapper).attribute,
        "product": CaptumInputXGradient(wrapper).attribute,
        "integrated": lambda x, target: CaptumIntegratedGradients(wrapper).attribute(x, target=target, n_steps=5),
    }
    ours = {
        "saliency": Saliency(),
        "product": InputXGradient(),
        "integrated": IntegratedGradients(baseline="zero", n_steps=5),
    }
    for name, method in ours.items():
        with frozen(net):
            maps = run(method, o).maps
        for column in range(2):
            expected = captum[name](image[None].clone(), target=column)[0]
            assert_equal(maps[column], expected.detach())


def test_columns_are_the_scores():
    net, image = network(2, 1), noise(1, 12, 9)
    targets = [MultiClassMask(0), Box(1, (2, 2), (6, 6), reduction="mean")]
    o, _ = objective(net, image, INFERER, targets)
    wrapper = TargetWrapper(net, targets, INFERER)
    assert_equal(wrapper(image[None])[0].detach(), o.image_values())


def test_several_scores_of_one_target_are_columns():
    case = build("ResNet18", 2)
    wrapper = TargetWrapper(case.network, ClassScore(top_k=3)).freeze(case.image)
    logits = case.logits(case.image)
    assert torch.equal(wrapper(case.image), logits.sort(descending=True).values)


def test_the_mask_stays_that_of_the_unperturbed_image():
    net, image = network(2, 1), noise(1, 12, 9)
    wrapper = TargetWrapper(net, MultiClassMask(1), INFERER)
    wrapper(image[None])
    mask = wrapper.scores[0][0].mask.clone()
    wrapper(-image[None])
    assert torch.equal(wrapper.scores[0][0].mask, mask)
    other = TargetWrapper(net, MultiClassMask(1), INFERER).freeze(-image[None]).scores[0][0]
    assert other.mask.shape != mask.shape or not torch.equal(other.mask, mask)
    with torch.no_grad():
        prediction = INFERER(image[None], net)
    given = TargetWrapper(net, MultiClassMask(1), INFERER, prediction=prediction)
    assert torch.equal(given.scores[0][0].mask, mask)


class CountedVoxels(nn.Module):
    """A naive wrapper: the number of voxels above a threshold."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x):
        return (torch.sigmoid(self.network(x)) > 0.5).to(x.dtype).flatten(1).sum(1) + 0 * x.flatten(1).sum(1)


def test_no_zero_gradient_where_a_count_of_voxels_has_one():
    net, image = network(2, 1), noise(1, 1, 12, 9)
    counted = CaptumSaliency(CountedVoxels(net)).attribute(image.clone())
    assert not counted.any()
    wrapper = TargetWrapper(net, ThresholdMask(0.5)).freeze(image)
    assert (CaptumSaliency(wrapper).attribute(image.clone(), target=0) > 0).double().mean() > 0.9


@pytest.mark.parametrize("name", ["SoftmaxInside", "TupleNet", "TwoHeads"])
def test_softmax_inside_and_several_outputs_under_monais_sliding_window(name):
    case = build(name, 2)
    image = noise(1, 20, 18)
    inferer = SlidingWindowInferer((16, 16), 2, 0.25, "gaussian")
    target = Box(1, (0, 0), (20, 18))
    wrapper = TargetWrapper(case.network, target, inferer, output=case.output).freeze(image[None])
    expected = CaptumSaliency(wrapper).attribute(image[None].clone(), target=0, abs=False)[0]

    selected = Computed(lambda out: (out if case.output is None else out[case.output]).clone(), case.network)
    o, _ = objective(selected, image, inferer, [target])
    with frozen(o.model.network):
        assert_equal(run(Saliency(abs=False), o).maps[0], expected)


def test_softmax_inside_without_a_copy_is_the_trap_that_the_wrapper_avoids():
    case = build("SoftmaxInside", 2)
    image = noise(1, 1, 20, 18).requires_grad_(True)
    prediction = SlidingWindowInferer((16, 16), 2, 0.25, "gaussian")(image, case.network)
    with pytest.raises(RuntimeError, match="inplace"):
        prediction.sum().backward()


def test_each_case_of_a_batch_has_its_own_mask():
    net = network(2, 1)
    images = torch.stack([noise(1, 12, 9), noise(1, 12, 9, seed=1)])
    both = TargetWrapper(net, MultiClassMask(1), INFERER).freeze(images)(images)
    for i in range(2):
        alone = TargetWrapper(net, MultiClassMask(1), INFERER)(images[i : i + 1])
        assert_equal(both[i].detach(), alone[0].detach())
    with pytest.raises(TargetError, match="one case at a time"):
        TargetWrapper(net, MultiClassMask(1), INFERER).freeze(images)(torch.cat([images, images]))
    with pytest.raises(TargetError, match=r"call freeze\(image\)"):
        TargetWrapper(net, MultiClassMask(1), INFERER)(images)


def test_world_coordinates_come_from_a_metatensor():
    net, image = network(2, 1), noise(1, 1, 12, 9)
    affine = torch.diag(torch.tensor([2.0, 3.0, 1.0, 1.0]))
    wrapper = TargetWrapper(net, Voxel(1, world=(6.0, 9.0))).freeze(MetaTensor(image, affine=affine))
    assert wrapper.scores[0][0].box == (slice(3, 4), slice(3, 4))
