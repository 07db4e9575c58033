"""The test networks are what the other tests take them for: random throughout, alive, calibrated, repeatable."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.networks import CLASSES, NAMES, SEGMENTATION, NetworkCase, build

EVERY = [pytest.param(name, dims, id=f"{name}-{dims}d") for name in NAMES for dims in (2, 3)]


def _mean_over_predicted(case: NetworkCase, x: torch.Tensor) -> torch.Tensor:
    """The usual target: mean logit of class 1 where the image is predicted as class 1 (frozen)."""
    mask = case.logits(case.image).argmax(1) == 1
    return case.logits(x)[:, 1][mask].mean()


@pytest.mark.parametrize(("name", "dims"), EVERY)
@torch.no_grad()
def test_calibrated(name: str, dims: int) -> None:
    case = build(name, dims)
    assert not case.network.training
    assert case.image.shape == case.reference.shape == (1, 1, *case.roi)
    assert case.logits(case.image).shape == (1, CLASSES, *(case.roi if case.kind == SEGMENTATION else ()))
    for class_index in range(CLASSES):
        value, start = case.score(case.image, class_index).item(), case.score(case.reference, class_index).item()
        if case.probability:
            assert 0.02 < abs(value - start) < 1
        else:
            assert 0.3 < abs(value - start) < 1.5
        assert abs(value - start) >= 0.1 * abs(value)
    if case.kind == SEGMENTATION:
        predicted = case.logits(case.image).argmax(1)
        for class_index in range(CLASSES):
            assert 0.02 < (predicted == class_index).double().mean() < 0.95  # float32 chose it, float64 may differ
        value, start = _mean_over_predicted(case, case.image).item(), _mean_over_predicted(case, case.reference).item()
        assert abs(value - start) >= 0.1 * abs(value)


@pytest.mark.parametrize(("name", "dims"), EVERY)
def test_gradient_reaches_most_voxels(name: str, dims: int) -> None:
    case = build(name, dims)
    image = case.image.clone().requires_grad_()
    case.score(image).sum().backward()
    assert image.grad is not None
    assert image.grad.isfinite().all()
    assert (image.grad != 0).double().mean() > 0.9
    assert all(p.requires_grad for p in case.network.parameters())


@pytest.mark.parametrize(("name", "dims"), EVERY)
def test_nothing_is_left_at_its_initial_value(name: str, dims: int) -> None:
    case = build(name, dims)
    for path, module in case.network.named_modules():
        for kind in ("weight", "bias", "running_mean", "running_var"):
            value = getattr(module, kind, None)
            if not isinstance(value, torch.Tensor):
                continue
            if value.numel() > 1:
                assert value.std() > 0, f"{path}.{kind} is constant"
            else:
                assert value.item() not in (0.0, 1.0, 0.25), f"{path}.{kind} is at its initial value"


@pytest.mark.parametrize(("name", "dims"), EVERY)
def test_cam_layer_has_a_grid(name: str, dims: int) -> None:
    case = build(name, dims)
    shapes: list[torch.Size] = []
    case.network.get_submodule(case.cam_layer).register_forward_hook(lambda m, i, o: shapes.append(o.shape))
    case.network(case.image)
    positions = shapes[0][2:].numel() if len(shapes[0]) == dims + 2 else shapes[0][1]
    assert positions >= 4**dims


def test_what_is_stated_about_the_kinds() -> None:
    """Norms and activations are read off the running network: the kinds that methods must cope with all occur."""
    cases = {name: build(name, 2) for name in NAMES}
    assert cases["UNet_instance"].norm == cases["DynUNet"].norm == cases["UNETR"].norm == "instance"
    assert cases["UNet_batch"].norm == cases["ResNet18"].norm == "batch"
    assert cases["SegResNet"].norm == "group"
    assert cases["ViT"].norm == "layer"
    assert cases["UNet_instance"].activations == {"prelu"}
    assert cases["UNet_batch"].activations == {"relu"}
    assert cases["VNet"].activations == {"elu"}
    assert cases["ViT"].activations == {"gelu", "softmax"}
    seen = set().union(*(case.activations for case in cases.values()))
    assert seen >= {"relu", "leaky_relu", "prelu", "elu", "gelu", "silu", "swish", "mish", "softplus", "sigmoid"}


def test_outputs_that_are_no_tensor() -> None:
    kinds = {name: type(case.network(case.image)) for name in NAMES if (case := build(name, 2)).output is not None}
    assert kinds == {"BasicUNetPlusPlus": list, "ViT": tuple, "ViTAutoEnc": tuple, "TwoHeads": dict, "TupleNet": tuple}


def test_prelu_has_one_slope_a_channel() -> None:
    slopes = [m.weight for m in build("UNet_instance").network.modules() if isinstance(m, nn.PReLU)]
    assert slopes
    assert all(weight.numel() > 1 and weight.unique().numel() == weight.numel() for weight in slopes)


def test_shared_modules_stay_shared_in_the_copy() -> None:
    network = build("SharedNet").network
    assert network.first is network.second
    assert network.act is network.act_again


def test_softmax_inside_returns_probabilities() -> None:
    case = build("SoftmaxInside")
    assert torch.allclose(case.logits(case.image).sum(1), torch.ones((), dtype=torch.float64), rtol=1e-12, atol=0)


def test_repeatable_and_independent() -> None:
    """Same arguments, same network; what a caller does to it stays there; another seed is another network."""
    state = torch.random.get_rng_state()
    first = build("UNet_batch", 2, seed=5)
    assert torch.equal(state, torch.random.get_rng_state())
    weights = copy.deepcopy(first.network.state_dict())
    with torch.no_grad():
        for parameter in first.network.parameters():
            parameter.zero_()
        first.image.zero_()
    again = build("UNet_batch", 2, seed=5)
    assert all(torch.equal(value, weights[key]) for key, value in again.network.state_dict().items())
    assert again.image.abs().sum() > 0
    other = build("UNet_batch", 2, seed=6)
    assert not torch.equal(again.image, other.image)
    assert not torch.equal(next(again.network.parameters()), next(other.network.parameters()))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_other_dtypes_channels_and_seeds(name: str) -> None:
    case = build(name, 2, dtype=torch.float32, seed=3, in_channels=2)
    assert case.image.shape == (1, 2, *case.roi)
    assert {p.dtype for p in case.network.parameters()} == {case.image.dtype} == {torch.float32}
    difference = (case.score(case.image) - case.score(case.reference)).item()
    assert (0.02 if case.probability else 0.3) < difference < 1.5
