"""No method leaves a trace: not in another method's map, and not in the network, also after an exception."""

from __future__ import annotations

import copy

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import nn

from esegeta_monai import Explainer
from esegeta_monai.engine.network.state import frozen
from esegeta_monai.engine.rules import lrp
from esegeta_monai.methods import (
    ClassImage,
    DeepDream,
    FeatureVisualization,
    GradCam,
    GuidedBackprop,
    InputXGradient,
    IntegratedGradients,
    InvertedRepresentation,
    LayerActivation,
    Occlusion,
    Saliency,
    SmoothGrad,
    run,
)
from esegeta_monai.targets import MultiClassMask, Voxel
from tests.networks import build
from tests.support.networks import conv_norm_relu
from tests.support.objectives import objective

MAKE = {
    "Saliency": Saliency,
    "InputXGradient": InputXGradient,
    "IntegratedGradients": lambda: IntegratedGradients(n_steps=3),
    "IntegratedGradients-adaptive": lambda: IntegratedGradients(tolerance=0.1, max_steps=12),
    "SmoothGrad": lambda: SmoothGrad(n_samples=2),
    "SmoothGrad-GuidedBackprop": lambda: SmoothGrad("GuidedBackprop", n_samples=2),
    "GuidedBackprop": GuidedBackprop,
    "GradCam": lambda: GradCam(relu=False),
    "LayerActivation": LayerActivation,
    "Occlusion": lambda: Occlusion(8),
    "FeatureVisualization": lambda: FeatureVisualization(n_iter=2),
    "ClassImage": lambda: ClassImage(n_iter=2),
    "DeepDream": lambda: DeepDream(n_iter=1),
    "InvertedRepresentation": lambda: InvertedRepresentation(n_iter=2),
}
INFERER = SlidingWindowInferer((16, 16), 2, 0.5, "gaussian")


def image(channels: int = 1) -> torch.Tensor:
    return torch.rand(channels, 24, 20, generator=torch.Generator().manual_seed(0))


class Faulty(nn.Module):
    """Raises on its n-th call."""

    def __init__(self) -> None:
        super().__init__()
        self.left: int | None = None

    def forward(self, x):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise ZeroDivisionError("injected")
        return x


class Network(nn.Module):
    """Batch norm, dropout, an in-place activation under two names, a parameter that is frozen, one with a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.LeakyReLU(0.1, inplace=True)
        self.act_again = self.act
        self.drop = nn.Dropout(0.5)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.faulty = Faulty()
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        x = self.drop(self.act(self.norm(self.first(x))))
        return self.head(self.act_again(self.faulty(self.second(x))))


def trained() -> Network:
    """As it comes out of a training step: train mode, but for one layer, gradients, hooks of the user's own."""
    torch.manual_seed(0)
    network = Network()
    network(torch.rand(2, 1, 16, 16)).sum().backward()
    network.norm.eval()
    network.second.bias.requires_grad_(False)
    network.head.weight.grad = None
    network.head.register_forward_hook(lambda module, args, output: None)
    network.first.register_forward_pre_hook(lambda module, args: None)
    return network


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def snapshot(network: nn.Module):
    return {
        "weights": copy.deepcopy(network.state_dict()),
        "identity": [id(p) for p in [*network.parameters(), *network.buffers()]],
        "requires_grad": [p.requires_grad for p in network.parameters()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in network.parameters()],
        "training": [m.training for m in network.modules()],
        "hooks": [[list(getattr(m, h).items()) for h in HOOKS] for m in network.modules()],
        "forwards": [m.__dict__.get("forward") for m in network.modules()],
    }


def assert_unchanged(network: nn.Module, before) -> None:
    after = snapshot(network)
    for name in ("identity", "requires_grad", "training", "hooks", "forwards"):
        assert after[name] == before[name], name
    for key, value in before["weights"].items():
        assert torch.equal(after["weights"][key], value), key
    for now, then in zip(after["gradients"], before["gradients"]):
        assert (now is None) == (then is None)
        assert now is None or torch.equal(now, then)


@pytest.mark.parametrize("b", MAKE)
@pytest.mark.parametrize("name", ["own", "SharedNet"])
def test_a_is_bit_equal_before_and_after_b(name, b):
    network = trained() if name == "own" else build(name, 2, dtype=torch.float32).network
    o, _ = objective(network.eval(), image(), INFERER, [MultiClassMask(1), Voxel(0, index=(3, 3))])
    between = MAKE[b]()
    with frozen(network):
        for a in MAKE:
            method = MAKE[a]()
            before = run(method, o).maps.clone()
            run(between, o)
            assert torch.equal(run(method, o).maps, before), f"{a} before and after {b}"


@pytest.mark.parametrize("name", MAKE)
def test_the_network_leaves_as_it_came(name):
    network, scan = trained(), image()[None]
    before, pixels = snapshot(network), scan.clone()
    explainer = Explainer(network, inferer=INFERER)
    attributions = list(explainer(scan, methods=[MAKE[name]()], targets=[MultiClassMask(1)]))
    assert attributions[0].map is not None
    assert_unchanged(network, before)
    assert torch.equal(scan, pixels)


@pytest.mark.parametrize("after", [0, 1, 3, 7])
@pytest.mark.parametrize("name", MAKE)
def test_the_network_leaves_as_it_came_after_an_exception(name, after):
    network = trained()
    before = snapshot(network)
    explainer = Explainer(network, inferer=INFERER)
    network.faulty.left = after
    with pytest.raises(ZeroDivisionError, match="injected"):
        list(explainer(image()[None], methods=[MAKE[name](), Occlusion(4)], targets=[MultiClassMask(1)]))
    assert_unchanged(network, before)
    network.faulty.left = None
    assert next(iter(explainer(image()[None], methods=[MAKE[name]()], targets=[MultiClassMask(1)]))).map is not None


def test_an_abandoned_run_leaves_the_network_as_it_came():
    """The caller takes one map of several and goes away."""
    network = trained()
    before = snapshot(network)
    attributions = Explainer(network, inferer=INFERER).stream(
        image()[None], methods=["Occlusion(8)", "Saliency"], targets=["MultiClassMask(1)"]
    )
    next(attributions)
    assert_unchanged(network, before)
    attributions.close()
    assert_unchanged(network, before)


def test_random_state_and_grad_mode_are_left_alone():
    network = trained()
    explainer = Explainer(network, inferer=INFERER)
    state = torch.get_rng_state()
    with torch.no_grad():
        for attribution in explainer(image()[None], methods=[m() for m in MAKE.values()], targets=[MultiClassMask(1)]):
            assert not torch.is_grad_enabled()
            assert attribution.map is not None
    assert torch.equal(torch.get_rng_state(), state)


def test_a_plain_training_loop_goes_as_without_the_explainer():
    """Dropout and batch norm, which draw random numbers and gather statistics; the weights are bit-equal."""
    weights = []
    for watched in (False, True):
        torch.manual_seed(0)
        network = Network().train()
        optimizer = torch.optim.Adam(network.parameters(), 0.01)
        explainer = Explainer(network, inferer=INFERER)
        for step in range(3):
            x = torch.rand(2, 1, 16, 16)
            optimizer.zero_grad()
            (network(x) - x).square().mean().backward()
            optimizer.step()
            if watched:
                seen = explainer(
                    image()[None], methods=["Saliency", "SmoothGrad", "Occlusion(8)"], targets=[Voxel(0, index=(3, 3))]
                )
                assert all(a.map is not None for a in seen), step
        weights.append({k: v.clone() for k, v in network.state_dict().items()})
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def state(network: nn.Module):
    return (
        [m.training for m in network.modules()],
        [p.requires_grad for p in network.parameters()],
        [None if p.grad is None else p.grad.clone() for p in network.parameters()],
        {k: v.clone() for k, v in network.state_dict().items()},
        [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in network.modules()],
    )


def same(a, b) -> bool:
    return (
        a[0] == b[0]
        and a[1] == b[1]
        and all((x is None and y is None) or torch.equal(x, y) for x, y in zip(a[2], b[2]))
        and all(torch.equal(a[3][k], b[3][k]) for k in a[3])
        and a[4] == b[4]
    )


@pytest.mark.parametrize("fail", [False, True])
def test_frozen_puts_everything_back(fail):
    network = conv_norm_relu()
    network[0].bias.requires_grad_(False)
    network[1].eval()
    network(torch.rand(2, 1, 6, 6)).sum().backward()
    before = state(network)
    try:
        with frozen(network):
            assert not any(m.training for m in network.modules())
            assert not any(p.requires_grad for p in network.parameters())
            network.train()
            network[0].weight.requires_grad_(True)
            network[0].weight.grad = None
            if fail:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fail
    assert same(state(network), before)
    assert network.training
    assert not network[1].training


def test_frozen_puts_back_buffers_that_the_network_writes_itself():
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("seen", torch.zeros(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            self.seen = self.seen + 1
            return x * self.calls

    network = Counts()
    seen = network.seen
    with frozen(network):
        network(torch.rand(2))
    assert float(network.calls) == 0
    assert network.seen is seen
    assert float(seen.sum()) == 0


def test_frozen_sets_backward_hooks_aside():
    """They may change gradients, which would not be those of F then, and rules cannot see through what they insert."""
    network, x = conv_norm_relu().eval(), torch.rand(1, 1, 6, 6)
    called = []
    network[3].register_full_backward_hook(lambda module, above, below: called.append(module))
    network.register_full_backward_pre_hook(lambda module, above: called.append(module))
    with frozen(network):
        torch.autograd.grad(network(x.requires_grad_()).sum(), x)
        assert not called
        lrp(network, x.detach(), torch.ones(1, 1, 2, 4, 4))
    torch.autograd.grad(network(x).sum(), x)
    assert len(called) == 2
