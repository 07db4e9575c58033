"""Contrasts through windows: normalised and cut at zero only where all windows have been added."""

from __future__ import annotations

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import nn

from esegeta_monai import Explainer
from esegeta_monai.engine.rules import composite_of, contrastive_excitation, contrastive_lrp
from esegeta_monai.errors import MethodError, UsageError
from esegeta_monai.methods import ContrastiveExcitationBackprop, ContrastiveLRP
from esegeta_monai.targets import ClassScore, MultiClassMask
from tests.support.layers import setting
from tests.support.objectives import explain, objective_of
from tests.support.tensors import DOUBLE, close

METHODS = [ContrastiveExcitationBackprop, ContrastiveLRP]


def _naive(method, objective, windows_at_once: bool):
    """Both sides of all windows in one call (or one by one), scattered by hand, then compared."""
    plan, model = objective.plan, objective.model
    cotangents = torch.stack(objective.cotangents(objective.windows))
    images = torch.stack([plan.cut(objective.image, w) for w in objective.windows])
    composite = composite_of({"convolution": "ZPlus", "dense": "ZPlus"})
    parts = [slice(0, len(images))] if windows_at_once else [slice(i, i + 1) for i in range(len(images))]
    maps = torch.zeros(2, *objective.image.shape, dtype=DOUBLE)
    kept = torch.zeros(2, dtype=DOUBLE)
    for part in parts:
        x, c = images[part], cotangents[:, part]

        def forward(z):
            return model(z)[:, objective.channels]

        if method is ContrastiveLRP:
            sides = contrastive_lrp(forward, x, c, composite)
        else:
            sides = contrastive_excitation(forward, x, c)
        kept += sides.kept[:, 0]
        for j, w in enumerate(objective.windows[part]):
            place = (slice(None), *plan.slices[w])
            maps[0][place] += sides.target[0, j]
            maps[1][place] += sides.opposite[0, j]
    if method is ContrastiveLRP:
        return maps[0] - maps[1]
    return cotangents.sum() * (maps[0] / kept[0] - maps[1] / kept[1])


NETWORKS = ["UNet_batch", "UNet_instance", "SegResNet", "UNETR"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "dims"),
    [(n, 2) for n in NETWORKS] + [pytest.param(n, 3, marks=pytest.mark.slow) for n in ("UNet_batch", "SegResNet")],
)
def test_windows_equal_one_computation(name, dims, method):
    """Three overlapping gaussian windows in batches of two: as all in one batch, and as each alone."""
    s = setting(name, dims, MultiClassMask(1))
    result = explain(method(positive=False), s.objective)
    for at_once in (True, False):
        close(result.maps[0], _naive(method, s.objective, at_once))
    close(explain(method(), s.objective).maps, result.maps.clamp(min=0))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_windowed_equals_the_whole_volume(method, dims):
    """A network that sees one voxel at a time: windows, overlaps and weights do not matter at all."""
    torch.manual_seed(0)
    conv, norm = {2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)}[dims]
    network = nn.Sequential(conv(2, 6, 1), norm(6), nn.ReLU(), conv(6, 5, 1), nn.ReLU(), conv(5, 3, 1)).double().eval()
    network[1].running_mean.normal_()
    image = torch.rand(2, *[12] * dims, dtype=DOUBLE)
    whole = objective_of(network, image, [MultiClassMask(1)])
    inferer = SlidingWindowInferer((8,) * dims, 2, 0.5, "gaussian")
    windowed = objective_of(network, image, [MultiClassMask(1)], inferer)
    assert len(windowed.windows) > 1
    for positive in (True, False):
        reference = explain(method(positive=positive), whole)
        close(explain(method(positive=positive), windowed).maps, reference.maps)


@pytest.mark.parametrize("name", ["UNet_batch", "UNet_instance", "SegResNet", "ViT", "DenseNet121", "UNETR"])
def test_relevance_is_conserved(name):
    s = setting(name)
    result = explain(ContrastiveLRP(positive=False), s.objective)
    assert result.notes["completeness_gap"][0] <= 1e-9
    result = explain(ContrastiveExcitationBackprop(positive=False), s.objective)
    assert 0 < result.notes["kept_target"][0] <= 1 + 1e-12
    assert result.maps.min() < 0 < result.maps.max()


def test_contrast_of_excitation_adds_up_to_nothing_without_biases():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1, bias=False)]
    network = nn.Sequential(*layers).double().eval()
    image = torch.rand(1, 12, 12, dtype=DOUBLE)
    objective = objective_of(network, image, [MultiClassMask(1)], SlidingWindowInferer((8, 8), 2, 0.5, "gaussian"))
    result = explain(ContrastiveExcitationBackprop(positive=False), objective)
    assert result.maps.abs().sum() > 0.1 * float(objective.scores[0].voxels)
    assert abs(float(result.maps.sum())) <= 1e-10 * float(result.maps.abs().sum())


@pytest.mark.parametrize("method", METHODS)
def test_each_class_keeps_its_own_half(method):
    """Two bright halves, a class that reads each: plain relevance shows both to either, the contrast only its own."""
    network = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 16, 2, bias=False))
    network = network.double().eval()
    left = torch.zeros(4, 4)
    left[:, :2] = 1
    with torch.no_grad():
        network[0].weight.fill_(1.0)
        both = torch.stack([2 * left - (1 - left), 2 * (1 - left) - left])
        network[3].weight.copy_((both[:, None].repeat(1, 2, 1, 1)).reshape(2, -1))
    objective = objective_of(network, torch.ones(1, 4, 4, dtype=DOUBLE), [ClassScore(0), ClassScore(1)])
    maps = explain(method(), objective).maps[:, 0]
    assert (maps[0][:, :2] > 0).all()
    assert (maps[0][:, 2:] == 0).all()
    assert (maps[1][:, :2] == 0).all()
    assert (maps[1][:, 2:] > 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_only_linear_scores(method):
    s = setting("UNet_batch")
    with pytest.raises(MethodError, match="output='logit'"):
        list(Explainer(s.network, s.inferer)(s.image[None], [method()], [MultiClassMask(1, output="probability")]))


def test_an_unknown_composite_is_refused_at_once():
    with pytest.raises(UsageError):
        ContrastiveLRP(composite="EpsilonMinus")


class OneLogit(nn.Module):
    """One logit of two classes; ``sign`` −1 gives that of the other class by the last weights."""

    def __init__(self, sign: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4 * 64, 1)
        with torch.no_grad():
            for p in self.head.parameters():
                p *= sign

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).relu().flatten(1))


NEGATIVE = ClassScore("benign")
POSITIVE = ClassScore("malignant")
NAMES = {0: "benign", 1: "malignant"}


def _map(network: nn.Module, method: object, target: object) -> torch.Tensor:
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    (attribution,) = Explainer(network.double().eval(), class_names=NAMES)(image, [method], [target])
    assert attribution.map is not None
    return attribution.map.as_tensor()


@pytest.mark.parametrize("method", METHODS)
def test_the_negative_of_a_logit_is_the_logit_of_negative_weights(method) -> None:
    ours = _map(OneLogit(), method(positive=False), NEGATIVE)
    assert ours.any()
    close(ours, _map(OneLogit(-1), method(positive=False), POSITIVE), 1e-12)
    other = _map(OneLogit(), method(positive=False), POSITIVE)
    close(ours, other if method is ContrastiveLRP else -other, 1e-12)  # F and the sides of LRP change their signs both


@pytest.mark.parametrize(
    "method",
    ["GuidedBackprop", "Deconvolution", "GuidedGradCam('conv')", "ExcitationBackprop", "SmoothGrad('GuidedBackprop')"],
)
def test_methods_of_positive_signals_refuse_a_negative_start(method: str) -> None:
    assert _map(OneLogit(), method, POSITIVE).any()
    with pytest.raises(MethodError, match="negative start"):
        _map(OneLogit(), method, NEGATIVE)


def test_a_mixed_start_is_refused() -> None:
    network, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double(), torch.rand(1, 3, dtype=DOUBLE)
    with pytest.raises(MethodError, match="rises with some outputs"):
        contrastive_excitation(network, x, torch.tensor([[[1.0, -1.0]]], dtype=DOUBLE))
    with pytest.raises(MethodError, match="rises with some outputs"):
        contrastive_lrp(network, x, torch.tensor([[[1.0, -1.0]]], dtype=DOUBLE), composite_of("DeepTaylor"))
