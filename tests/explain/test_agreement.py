"""Agreement of members and views: maps of each alone, their spread, and shuffled maps as the value of no agreement."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from scipy.stats import spearmanr
from torch import nn

from esegeta_monai import Explainer
from esegeta_monai.explain.agreement import _shuffled, summary
from esegeta_monai.explain.ensemble import EnsembleInferer
from esegeta_monai.targets import MultiClassMask
from tests.explain.test_ensemble import setting
from tests.support.networks import small

TARGET = "Box(1, (2, 2), (24, 12))"
METHODS = ["VanillaBackprop", "IntegratedGradients(n_steps=4)", "LRP(composite='Epsilon')", "Occlusion(window=8)"]
LAYERS = ["GradCam('n', relu=False)", "HiResCam('n', relu=False)", "LayerActivation('n', reduce='sum')"]


def explained(inferer: Any, methods: list[str], target: Any = TARGET, network: nn.Module | None = None) -> list[Any]:
    members, _, image = setting()
    return list(Explainer(network or members[0], inferer, agreement=True)(image, methods, [target]))


def test_the_mean_of_the_members_is_the_map() -> None:
    members, inferer, _ = setting()
    result = explained(EnsembleInferer(inferer, members, (0,), weights=[0.3, 0.7]), [*METHODS, *LAYERS])
    for attribution in result:
        for kind, shares in (("members", [0.3, 0.7]), ("views", [0.5, 0.5])):
            maps = attribution.agreement.of(kind)
            mean = sum(w * m.as_tensor() for w, m in zip(shares, maps))
            whole = attribution.map.as_tensor()
            assert float((mean - whole).abs().max() / whole.abs().max()) < 1e-9, (attribution.method, kind)
            assert attribution.record["agreement"][kind]["mean_deviation"] < 1e-9


def test_a_member_alone_has_the_map_of_its_network() -> None:
    """The mask is that of the ensemble, so a plain explainer gets it as a box."""
    members, inferer, image = setting()
    (attribution,) = explained(EnsembleInferer(inferer, members), ["VanillaBackprop"])
    for member, ours in zip(members, attribution.agreement.members):
        (plain,) = Explainer(member, inferer)(image, ["VanillaBackprop"], [TARGET])
        torch.testing.assert_close(ours.as_tensor(), plain.map.as_tensor(), rtol=1e-10, atol=1e-14)
    assert attribution.agreement.views == []


def test_one_fold_twice_has_no_spread() -> None:
    members, inferer, _ = setting()
    (attribution,) = explained(EnsembleInferer(inferer, [members[0]] * 2), ["VanillaBackprop"])
    result = attribution.record["agreement"]["members"]
    assert result["sd"] == result["sd_normalised"] == 0
    assert result["same_sign"] == 1
    assert result["rank_correlation"] == pytest.approx(1)
    assert abs(result["shuffled"]["rank_correlation"]) < 0.3
    assert result["shuffled"]["same_sign"] < 0.9
    assert result["shuffled"]["sd_normalised"] > 0.1


def test_folds_trained_apart_agree_more_than_shuffled_maps() -> None:
    """Two small networks, trained apart to find the same bright disc, look at the same place."""
    disc = ((torch.cartesian_prod(torch.arange(24.0), torch.arange(24.0)) - torch.tensor([8.0, 14.0])) ** 2).sum(1) < 16
    truth = disc.reshape(1, 1, 24, 24).float()
    members = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.Conv2d(6, 1, 5, padding=2))
        optimiser = torch.optim.Adam(network.parameters(), 1e-2)
        for _ in range(150):
            image = truth + 0.3 * torch.randn_like(truth)
            loss = nn.functional.binary_cross_entropy_with_logits(network(image), truth)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        members.append(network.eval())
    torch.manual_seed(5)
    image = truth + 0.3 * torch.randn_like(truth)
    explainer = Explainer(members[0], EnsembleInferer(None, members), agreement=True)
    (attribution,) = explainer(image, ["IntegratedGradients(n_steps=16, baseline=0.0)"], ["ThresholdMask(0)"])
    result = attribution.record["agreement"]["members"]
    assert result["sd"] > 0
    assert result["rank_correlation"] > result["shuffled"]["rank_correlation"] + 0.2
    assert result["same_sign"] > result["shuffled"]["same_sign"] + 0.1
    assert result["sd_normalised"] < result["shuffled"]["sd_normalised"]


def test_values_equal_their_definitions() -> None:
    maps = torch.randn(3, 1, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    maps[:, :, :3] *= 1e-4
    result = summary(list(maps), [1 / 3] * 3, maps.mean(0), "members", torch.Generator().manual_seed(0))
    relevant = (maps.abs() > 0.01 * maps.abs().amax((1, 2, 3), keepdim=True)).any(0)
    assert result["voxels"] == int(relevant.sum())
    assert result["voxels"] < maps[0].numel()
    deviation = ((maps - maps.mean(0)) ** 2).sum(0).div(2).sqrt()
    assert result["sd"] == pytest.approx(float(deviation[relevant].mean()), rel=1e-12)
    pairs = [float(spearmanr(a[relevant], b[relevant]).statistic) for a, b in itertools.combinations(maps, 2)]
    assert result["rank_correlation"] == pytest.approx(sum(pairs) / 3, rel=1e-12)
    assert result["least_rank_correlation"] == pytest.approx(min(pairs), rel=1e-12)
    share = torch.stack([m.sign() == maps.mean(0).sign() for m in maps])[:, relevant].double().mean()
    assert result["same_sign"] == pytest.approx(float(share), rel=1e-12)
    scaled = maps / maps.abs().sum((1, 2, 3), keepdim=True)
    assert result["sd_normalised"] == pytest.approx(float(scaled.std(0).sum()), rel=1e-12)
    assert result["mean_deviation"] < 1e-12


@pytest.mark.parametrize("shape", [(1, 16, 24), (2, 8, 9, 17)])
def test_shuffling_moves_whole_blocks(shape: tuple[int, ...]) -> None:
    values = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    mixed = _shuffled(values, torch.Generator().manual_seed(0))
    kept = [n - n % -(-n // 8) for n in shape[1:]]
    assert list(mixed.shape[1:]) == kept
    low = [(n - k) // 2 for n, k in zip(shape[1:], kept)]
    inner = values[(slice(None), *(slice(a, a + k) for a, k in zip(low, kept)))]
    assert torch.equal(mixed.flatten().sort().values, inner.flatten().sort().values)
    assert not torch.equal(mixed, inner)
    if shape[1] == 16:  # neighbours within a block of 2 x 3 stay neighbours
        assert torch.equal(mixed[0, ::2, 1::3] - mixed[0, ::2, ::3], torch.ones(8, 8, dtype=torch.float64))


@pytest.mark.parametrize("average", ["output", "softmax"])
def test_targets_that_are_not_linear_state_the_difference(average: Any) -> None:
    members, inferer, image = setting()
    ensemble = EnsembleInferer(inferer, members, (1,), average=average)
    target = "Box(1, (2, 2), (24, 12), output='probability')"
    (attribution,) = explained(ensemble, ["VanillaBackprop"], target)
    result = attribution.record["agreement"]["members"]
    for member, ours in zip(members, attribution.agreement.members):
        (plain,) = Explainer(member, EnsembleInferer(inferer, mirror_axes=(1,)))(image, ["VanillaBackprop"], [target])
        torch.testing.assert_close(ours.as_tensor(), plain.map.as_tensor(), rtol=1e-8, atol=1e-14)
    if average == "output":
        assert result["mean_deviation"] > 1e-4
    else:
        assert result["mean_deviation"] < 1e-9


def test_a_single_network_has_nothing_to_compare() -> None:
    _, _, image = setting()
    explainer = Explainer(small(2), SlidingWindowInferer((16, 10), 1), agreement=True)
    (attribution,) = explainer(image, ["VanillaBackprop"], [MultiClassMask(1)])
    assert "agreement" not in attribution.record
    assert attribution.agreement is None


def test_the_default_layer_is_that_of_the_ensemble() -> None:
    members, inferer, _ = setting()
    (attribution,) = explained(EnsembleInferer(inferer, members), ["GradCam(relu=False)"])
    assert attribution.record["agreement"]["members"]["mean_deviation"] < 1e-9


def test_maps_without_signs_have_no_shared_sign() -> None:
    members, inferer, _ = setting()
    (attribution,) = explained(EnsembleInferer(inferer, members), ["Saliency"])
    assert attribution.record["agreement"]["members"]["same_sign"] is None


@pytest.mark.parametrize("method", ["VanillaBackprop", "IntegratedGradients(n_steps=3)", "Occlusion(window=8)"])
def test_a_dry_run_counts_the_passes_of_the_parts(method: str) -> None:
    """Passes of members and views alone, counted at the network, are those by which the estimate grows."""
    members, inner, image = setting()
    counted = [0]

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        counted[0] += len(inputs[0])

    members[0].register_forward_pre_hook(count)
    inferer, passes, estimates = EnsembleInferer(inner, members, (0,)), [], []
    for agreement in (False, True):
        explainer = Explainer(members[0], inferer, agreement=agreement, checks=False)
        counted[0] = 0
        list(explainer(image, [method], [TARGET]))
        passes.append(counted[0])
        (cost,) = explainer.costs(image, [method], [TARGET])
        estimates.append(cost)
    assert estimates[1].passes - estimates[0].passes == passes[1] - passes[0] > 0
    assert estimates[1].naive_passes == 3 * estimates[0].naive_passes
