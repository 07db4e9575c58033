"""Gradients with respect to weights: windows against autograd through the whole of MONAI's inferer."""

from __future__ import annotations

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import UNet
from torch import nn

from esegeta_monai.engine.network.state import evaluating, weights_hash
from esegeta_monai.engine.parameter_gradients import checkpoint_weights, parameter_gradients, parameters_of
from esegeta_monai.errors import MethodError, NetworkError, UsageError
from esegeta_monai.explain import EnsembleInferer
from esegeta_monai.targets import MultiClassMask, Voxel
from tests.support.objectives import objective_of


def unet(dims: int) -> nn.Module:
    torch.manual_seed(0)
    return UNet(dims, 2, 3, (4, 8), (2,), norm="batch").double().eval()


def inferer(dims: int) -> SlidingWindowInferer:
    return SlidingWindowInferer((8,) * dims, 3, 0.5, "gaussian")


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("output", ["logit", "probability"])
def test_windows_against_the_whole_inferer(dims: int, views: bool, output: str) -> None:
    network = unet(dims)
    image = torch.rand(2, *(13, 12, 10)[:dims], dtype=torch.float64)
    used = EnsembleInferer(inferer(dims), mirror_axes=(0,)) if views else inferer(dims)
    with torch.no_grad():
        most = int(used(image[None], network).argmax(1).flatten().mode()[0])
    targets = [MultiClassMask(most, output=output), Voxel(2, index=[5] * dims, output=output)]
    objective = objective_of(network, image, targets, used)
    before = weights_hash(network)
    with evaluating(network, "cpu"):
        actual = parameter_gradients(objective, parameters_of(network))
        assert not any(p.requires_grad for p in network.parameters())
    assert weights_hash(network) == before
    prediction = used(image[None], network)[0]
    for score, row in zip(objective.scores, actual):
        gradients = torch.autograd.grad(
            score.value(score.crop(prediction)), list(network.parameters()), retain_graph=True
        )
        expected = torch.cat([g.flatten() for g in gradients])
        assert expected.abs().max() > 0
        assert (row - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_some_layers_only() -> None:
    network = unet(2)
    objective = objective_of(network, torch.rand(2, 12, 12, dtype=torch.float64), [MultiClassMask(1)], inferer(2))
    name = next(n for n, m in network.named_modules() if isinstance(m, nn.Conv2d))
    with evaluating(network, "cpu"):
        whole = parameter_gradients(objective, parameters_of(network))
        part = parameter_gradients(objective, parameters_of(network, [name]))
    chosen = {id(p) for p in network.get_submodule(name).parameters()}
    at = torch.cat([torch.full((p.numel(),), id(p) in chosen) for p in network.parameters()])
    assert part.shape[1] == int(at.sum())
    assert torch.equal(part, whole[:, at])
    with pytest.raises(UsageError):
        parameters_of(network, ["no.such"])
    with pytest.raises(NetworkError, match="no weights"):
        parameters_of(nn.Sequential(nn.ReLU()), ["0"])


class _Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).detach())


def test_weights_without_a_path_are_refused() -> None:
    network = _Detached()
    objective = objective_of(network, torch.rand(1, 6, 6), [Voxel(1, index=[2, 2])])
    with evaluating(network, "cpu"), pytest.raises(MethodError, match="does not depend on the chosen weights"):
        parameter_gradients(objective, parameters_of(network, ["first"]))


def test_a_checkpoint_of_another_network_is_refused() -> None:
    network = unet(2)
    state = dict(network.state_dict())
    name = next(iter(state))
    assert set(checkpoint_weights(network, state)) >= set(state)
    with pytest.raises(NetworkError, match="has the shape"):
        checkpoint_weights(network, {**state, name: torch.zeros(3)})
    del state[name]
    with pytest.raises(NetworkError, match="has no weight"):
        checkpoint_weights(network, state)
