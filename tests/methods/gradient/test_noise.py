"""SmoothGrad: the hand-written mean, Captum's NoiseTunnel on the same noise, and noise that windows share."""

from __future__ import annotations

import pytest
import torch
from captum.attr import LayerGradientXActivation, NoiseTunnel
from captum.attr import Saliency as CaptumSaliency
from monai.inferers import SlidingWindowInferer
from torch import nn

from esegeta_monai import Explainer
from esegeta_monai.engine.baselines import noise_like
from esegeta_monai.engine.network.state import frozen
from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import UsageError
from esegeta_monai.methods import (
    HiResCam,
    InputXGradient,
    IntegratedGradients,
    Occlusion,
    Saliency,
    SmoothGrad,
    SmoothGradSquared,
    VarGrad,
    run,
)
from esegeta_monai.targets import ClassScore, MultiClassMask, TargetWrapper, Voxel
from tests.support.layers import setting
from tests.support.networks import network, plain
from tests.support.objectives import explain, full_gradient, objective, objective_of
from tests.support.tensors import assert_equal, close, noise

INFERER = SlidingWindowInferer((8, 8), 3, 0.5, "gaussian")


def drawn(o: Objective, n: int, std: float) -> torch.Tensor:
    """The noise that the run's seed gives, with the standard deviation of each channel as its unit."""
    generator = torch.Generator().manual_seed(o.seed)
    unit = o.image.flatten(1).std(1).reshape(-1, *(1,) * (o.image.ndim - 1)) * std
    return torch.stack([torch.randn(o.image.shape, generator=generator).double() * unit for _ in range(n)])


@pytest.mark.parametrize("dims", [2, 3])
def test_equals_the_hand_written_mean_of_full_gradients(dims):
    net, image = network(dims, 2), noise(2, *(13, 10, 9)[:dims])
    inferer = SlidingWindowInferer((8,) * dims, 3, 0.5, "gaussian")
    o, _ = objective(net, image, inferer, [MultiClassMask(1), Voxel(0, index=(2,) * dims, output="probability")])
    with frozen(net):
        maps = run(SmoothGrad(n_samples=3, std=0.3), o).maps
    noisy = image + drawn(o, 3, 0.3)
    for k, score in enumerate(o.scores):
        assert_equal(maps[k], torch.stack([full_gradient(net, x, inferer, score) for x in noisy]).mean(0))


def test_equals_captums_noise_tunnel_on_the_same_noise(monkeypatch):
    net, image = network(2, 1), noise(1, 13, 10)
    o, _ = objective(net, image, INFERER, [MultiClassMask(1)])
    with frozen(net):
        maps = run(SmoothGrad("Saliency", n_samples=4, std=0.2), o).maps
    wrapper = TargetWrapper(net, MultiClassMask(1), INFERER).freeze(image[None])
    monkeypatch.setattr(torch, "normal", lambda mean, std: drawn(o, 4, 0.2))
    expected = NoiseTunnel(CaptumSaliency(wrapper)).attribute(image[None], nt_type="smoothgrad", nt_samples=4, target=0)
    assert_equal(maps[0], expected[0])


def test_overlapping_windows_see_the_same_noise():
    """Every window's cut is the noisy volume's own, however many windows hold a voxel."""
    net, image = network(2, 1), noise(1, 20, 18)
    o, _ = objective(net, image, INFERER, [MultiClassMask(1)])
    seen: list[tuple[tuple[int, ...], torch.Tensor]] = []

    class Spy(Objective):
        def run(self, x, windows):
            seen.extend(zip(windows, x.detach().clone()))
            return super().run(x, windows)

    spy = Spy(o.model, image, o.plan, o.scores, o.prediction)
    with frozen(net):
        run(SmoothGrad(n_samples=1, std=0.5), spy)
    noisy = image + drawn(o, 1, 0.5)[0]
    assert len(seen) == len(o.windows) > 4
    for window, x in seen:
        assert torch.equal(x, noisy[(slice(None), *o.plan.place(window))])


def test_noise_has_the_scale_of_each_channel():
    image = torch.stack([noise(40, 40), 100 * noise(40, 40) + 7])
    sample = noise_like(image, 0.1, torch.Generator().manual_seed(0))
    assert_equal(sample.flatten(1).std(1), 0.1 * image.flatten(1).std(1), 0.05)


def test_the_same_seed_gives_the_same_map_and_another_seed_another():
    net, image = network(2, 1), noise(1, 13, 10)
    o, _ = objective(net, image, INFERER, [MultiClassMask(1)])
    with frozen(net):
        first, again = run(SmoothGrad(n_samples=2), o).maps, run(SmoothGrad(n_samples=2), o).maps
        o = o.derive(seed=1)
        other = run(SmoothGrad(n_samples=2), o).maps
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_without_noise_it_is_the_method_inside():
    net, image = network(2, 1), noise(1, 13, 10)
    o, _ = objective(net, image, INFERER, [MultiClassMask(1)])
    for method in (Saliency(), InputXGradient(), Occlusion(4), IntegratedGradients(n_steps=2, baseline="mean")):
        with frozen(net):
            assert_equal(run(SmoothGrad(method, n_samples=2, std=0), o).maps, run(method, o).maps, 1e-12)


def test_the_objective_is_left_at_its_image():
    net, image = network(2, 1), noise(1, 13, 10)
    o, prediction = objective(net, image, INFERER, [MultiClassMask(1)])
    with frozen(net):
        run(SmoothGrad(n_samples=2), o)
    assert o.image is image
    assert torch.equal(o.prediction, prediction)


def test_it_takes_after_the_method_inside():
    assert SmoothGrad("InputXGradient").additive
    assert not SmoothGrad("Saliency").additive
    assert not SmoothGrad("Saliency").signed
    assert SmoothGrad(Occlusion(4)).needs_gradient is False
    assert SmoothGrad(Occlusion(4)).units == Occlusion(4).units
    net, image = network(2, 1), noise(1, 13, 10)
    o, _ = objective(net, image, INFERER, [MultiClassMask(1)])
    method = SmoothGrad(n_samples=3)
    with frozen(net):
        run(method, o)
    assert o.context.progress.passes == method.passes(o)


@pytest.mark.parametrize("bad", [{"method": "DeepDream"}, {"n_samples": 0}, {"std": -0.1}])
def test_bad_parameters(bad):
    with pytest.raises(UsageError):
        SmoothGrad(**bad)


def test_squares_and_variance_of_the_samples_and_captum(monkeypatch):
    """Against the samples themselves, and Captum's NoiseTunnel with the same noise."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 64, 3)).double().eval()
    image = torch.randn(1, 8, 8, dtype=torch.float64)
    o = objective_of(net, image, [ClassScore(1)])
    samples = torch.stack(list(SmoothGrad(n_samples=6, std=0.3)._samples(o)))
    squared = explain(SmoothGradSquared(n_samples=6, std=0.3), o).maps
    variance = explain(VarGrad(n_samples=6, std=0.3), o).maps
    close(squared, samples.square().mean(0))
    close(variance, samples.var(0, unbiased=False))

    generator = o.generator()
    noise = torch.stack([noise_like(image, 0.3, generator) for _ in range(6)])
    monkeypatch.setattr(torch, "normal", lambda mean, std: noise.clone())
    tunnel = NoiseTunnel(CaptumSaliency(net))
    given = {"nt_samples": 6, "stdevs": 0.3, "target": 1, "abs": False}
    close(squared, tunnel.attribute(image[None], nt_type="smoothgrad_sq", **given).detach())
    close(variance, tunnel.attribute(image[None], nt_type="vargrad", **given).detach(), 1e-9)
    for method in (SmoothGradSquared("InputXGradient"), VarGrad("InputXGradient")):
        assert not method.additive
        assert not method.signed


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("kind", "wrapper"), [("smoothgrad", SmoothGrad), ("vargrad", VarGrad)])
def test_of_a_layer_equals_captums_noise_tunnel_on_the_same_noise(kind, wrapper, dims, monkeypatch):
    net, image = plain(dims)
    o = objective_of(net, image[0], [ClassScore(1)])
    method = wrapper("LayerGradientXActivation('act', reduce='channels')", n_samples=4, std=0.2)
    monkeypatch.setattr(torch, "normal", lambda mean, std: drawn(o, 4, 0.2))
    tunnel = NoiseTunnel(LayerGradientXActivation(net, net.act))
    expected = tunnel.attribute(image, nt_type=kind, nt_samples=4, target=1).detach()
    explained = explain(method, o)
    assert_equal(explained.maps, expected)
    assert (method.produces, explained.notes["layer"]) == ("layer map", "act")


def test_of_a_layer_through_windows_equals_hooks_on_noisy_volumes():
    s = setting("UNet_batch")
    image, expected = s.image, 0
    for noise_ in drawn(s.objective, 2, 0.3):
        s.image = image + noise_
        a, g = s.pass_()
        expected = expected + s.scatter((a * g).sum(1, keepdim=True)) / 2
    close(explain(SmoothGrad(f"HiResCam({s.layer!r}, relu=False)", 2, 0.3), s.objective).maps[0], expected)


def test_a_default_layer_is_chosen_without_noise():
    s = setting("SegResNet")
    o = s.objective.derive(seed=1)
    explained = explain(SmoothGrad("HiResCam(relu=False)", 2), o)
    assert explained.notes["layer"] == explain(HiResCam(), s.objective).notes["layer"]
    attribution = next(
        iter(Explainer(s.network, s.inferer)(image := s.image[None], ["SmoothGrad('GradCam')"], [MultiClassMask(1)]))
    )
    assert attribution.map is not None
    assert attribution.record["produces"] == "layer map"
    assert attribution.record["layer_spacing"] is not None
    assert attribution.map.shape[1:] == image.shape[2:]
