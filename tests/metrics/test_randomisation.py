"""Randomisation: order of execution, true re-initialisation, restored bit for bit; similarity; Adebayo's ordering."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.inferers import SimpleInferer
from scipy.stats import spearmanr
from skimage.metrics import structural_similarity
from torch import nn

from esegeta_monai.engine.network.state import frozen
from esegeta_monai.errors import MetricError, UsageError
from esegeta_monai.methods import GuidedBackprop, InputXGradient, Saliency, run
from esegeta_monai.metrics import (
    CascadingRandomisation,
    DataRandomisation,
    IndependentRandomisation,
    MetricInput,
    RandomLogit,
    controls,
)
from esegeta_monai.metrics.randomisation import execution_order, randomised, similarity
from esegeta_monai.targets import ClassScore, MultiClassMask
from tests.metrics.cases import linear_case, subject_of
from tests.support.networks import small
from tests.support.objectives import Naive
from tests.support.tensors import noise


class OutOfOrder(nn.Module):
    """Registered in another order than called, one layer twice, one never, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(4, 2, 1)
        self.unused = nn.Conv2d(1, 1, 1)
        self.norm = nn.BatchNorm2d(4)
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.twice = nn.Conv2d(4, 4, 1)
        self.offset = nn.Parameter(torch.randn(1, 2, 1, 1))
        self.register_buffer("kept", torch.randn(3), persistent=False)

    def forward(self, x):
        return self.last(self.twice(self.norm(self.twice(self.first(x))))) + self.offset


def state_of(net):
    return {n: t.detach().clone() for n, t in [*net.named_parameters(), *net.named_buffers()]}


def out_of_order() -> Naive:
    torch.manual_seed(0)
    return Naive(OutOfOrder().double().eval(), noise(1, 8, 12))


def test_layers_come_in_execution_order_each_at_its_last_call():
    assert execution_order(out_of_order().objective) == ["first", "norm", "twice", "last", ""]


def test_everything_is_restored_bit_for_bit_also_after_an_exception():
    case = out_of_order()
    before, state = state_of(case.net), torch.get_rng_state()
    inside: list[dict] = []

    def fail():
        with randomised(case.net, ["", "norm", "first"], 1):
            inside.append(state_of(case.net))
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    for name in ("first.weight", "first.bias", "offset"):
        assert not torch.equal(inside[0][name], before[name])
    assert torch.equal(inside[0]["last.weight"], before["last.weight"])
    assert torch.equal(inside[0]["norm.running_var"], torch.ones(4, dtype=torch.float64))
    after = state_of(case.net)
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_layer_is_drawn_as_a_fresh_one_is():
    case = out_of_order()
    with randomised(case.net, ["first"], 7):
        torch.manual_seed(7)
        fresh = nn.Conv2d(1, 4, 3, padding=1).double()
        drawn = case.net.first.weight.detach().clone()
    bound = 1 / 3  # kaiming_uniform(a=√5) of a fan of 9
    assert float(drawn.abs().max()) <= bound
    assert float(drawn.std()) == pytest.approx(float(fresh.weight.std()), rel=0.5)


@pytest.mark.parametrize("shape", [(1, 12, 14), (1, 9, 10, 11)])
def test_similarities_are_scipys_and_skimages(shape):
    a, b = noise(*shape), noise(*shape, seed=1)
    x, y = a.abs().sum(0).numpy(), b.abs().sum(0).numpy()
    assert similarity(a, b) == pytest.approx(spearmanr(x.ravel(), y.ravel()).statistic)
    reference = structural_similarity(x / x.max(), y / y.max(), win_size=7, data_range=1)
    assert similarity(a, b, "ssim") == pytest.approx(reference)
    assert similarity(a, a) == similarity(a, a, "ssim") == 1
    # zeros around both, as of a small target, do not make them alike
    wide = [torch.nn.functional.pad(m, (9,) * 2 * (len(shape) - 1)) for m in (a, b)]
    assert similarity(*wide) == pytest.approx(similarity(a, b))
    assert similarity(*wide, "ssim") == pytest.approx(similarity(a, b, "ssim"))
    box = torch.where(wide[0] != 0, 1.0, 0.0).double()  # flat wherever one of them is not zero
    assert similarity(box, wide[1]) == similarity(wide[0], box) == 0
    # nor does what rounding leaves there
    rounded = [m + 1e-7 * torch.randn(m.shape, dtype=m.dtype) * (m == 0) for m in wide]
    assert similarity(*rounded) == pytest.approx(similarity(a, b))
    assert similarity(a, torch.zeros_like(a)) == similarity(a, torch.zeros_like(a), "ssim") == 0


@pytest.mark.parametrize("kind", ["spearman", "ssim"])
@pytest.mark.parametrize("metric", [CascadingRandomisation, IndependentRandomisation])
def test_stages_by_hand(metric, kind):
    """Each stage explained again with the layers put anew by hand."""
    case = Naive(small(2, 1), noise(1, 9, 14), [MultiClassMask(1)])
    method = Saliency(abs=False)
    result = metric(stages=3, n_samples=2, similarity=kind).update(subject_of(case, method))
    with frozen(case.net):
        base = run(method, case.objective).maps[0]
        expected = []
        for sample in range(2):
            for stage in (["b"], ["n"], ["a"]):
                layers = ["b", "n", "a"][: ["b", "n", "a"].index(stage[0]) + 1]
                with randomised(case.net, layers if metric is CascadingRandomisation else stage, 3 + 1 + sample):
                    values = run(method, case.objective.derive(image=case.image)).maps[0]
                expected.append(similarity(base, values, kind))
    assert result.value == pytest.approx(np.mean(expected))
    assert result.curve["x"] == pytest.approx([*([0.0] if metric is CascadingRandomisation else []), 1 / 3, 2 / 3, 1])
    assert [s["layers"] for s in result.notes["stages"]] == [["b"], ["n"], ["a"]]
    assert result.n == 2


@pytest.mark.parametrize("kind", ["classification", "segmentation"])
@pytest.mark.parametrize("dims", [2, 3])
def test_controls_reach_one_and_the_perfect_map_does_not(kind, dims):
    case = linear_case(kind, dims)
    metric = CascadingRandomisation(n_samples=1)
    if kind == "classification":  # its weight has no reset_parameters: drawn with its own spread
        assert execution_order(case.objective) == [""]
    for control in controls():
        assert metric.update(subject_of(case, control)).value == 1
    assert metric.update(subject_of(case, InputXGradient())).value < 0.95
    zero = case.objective.derive(image=torch.zeros_like(case.image))
    result = metric.update(MetricInput(torch.zeros_like(case.image), zero, 0, InputXGradient()))
    assert result.value is None


def test_guided_backprop_keeps_its_similarity_and_the_gradient_loses_it():
    """The ordering of Adebayo et al. 2018 on a small ReLU network with an image that has edges."""
    torch.manual_seed(2)
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)).double().eval()
    image = torch.zeros(1, 24, 24, dtype=torch.float64)
    image[0, 6:16, 8:18] = 1
    image += 0.05 * noise(1, 24, 24)
    case = Naive(net, image, [ClassScore(1)], SimpleInferer())
    last = {}
    for method in (Saliency(), GuidedBackprop()):
        result = CascadingRandomisation(stages=5, n_samples=2).update(subject_of(case, method))
        last[method.name] = result.value
    assert last["GuidedBackprop"] > last["Saliency"]


def test_random_logit_compares_with_the_other_classes():
    case = Naive(small(2, 1), noise(1, 9, 14), [MultiClassMask(1), MultiClassMask(2)])
    method = Saliency(abs=False)
    result = RandomLogit(n_samples=5).update(subject_of(case, method))
    assert sorted(result.notes["classes"]) == [0, 2]
    mask = torch.zeros(case.image.shape[1:], dtype=torch.bool)
    mask[case.scores[0].box] = case.scores[0].mask
    maps = []
    for c in range(3):
        x = case.image[None].clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(case.inferer(x, case.net)[0, c][mask].sum(), x)
        maps.append(gradient[0])
    expected = np.mean([similarity(maps[1], maps[c]) for c in (0, 2)])
    assert result.value == pytest.approx(float(expected), abs=1e-9)


def test_data_randomisation_takes_a_second_network(tmp_path):
    case, other = Naive(small(2, 1), noise(1, 9, 14)), small(2, 1)
    torch.manual_seed(99)
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(torch.randn_like(p))
    method, before = Saliency(abs=False), state_of(case.net)
    result = DataRandomisation(other).update(subject_of(case, method)).value
    torch.save(other.state_dict(), tmp_path / "random.pt")
    assert DataRandomisation(tmp_path / "random.pt").update(subject_of(case, method)).value == result
    with frozen(other):
        reference = run(method, Naive(other, case.image).objective.derive(scores=case.scores)).maps[0]
    assert result == pytest.approx(similarity(subject_of(case, method).map, reference), abs=1e-9)
    assert all(torch.equal(v, before[n]) for n, v in state_of(case.net).items())
    assert DataRandomisation(tmp_path / "random.pt").parameters["network"] == "random.pt"
    with pytest.raises(MetricError, match="second network"):
        DataRandomisation().update(subject_of(case, method))
    with pytest.raises(UsageError, match="do not fit"):
        DataRandomisation(small(2, 2)).update(subject_of(case, method))
    with pytest.raises(UsageError, match="cannot be read"):
        DataRandomisation(tmp_path / "absent.pt").update(subject_of(case, method))
    (tmp_path / "scan.nii.gz").write_bytes(b"\x1f\x8b no weights")
    with pytest.raises(UsageError, match=r"scan\.nii\.gz cannot be read as a state dict"):
        DataRandomisation(tmp_path / "scan.nii.gz").update(subject_of(case, method))


def test_refusals():
    with pytest.raises(UsageError, match="similarity"):
        CascadingRandomisation(similarity="hog")
    with pytest.raises(UsageError, match="stages"):
        CascadingRandomisation(stages=0)
    net = torch.jit.script(nn.Conv2d(1, 2, 1).double())
    case = Naive(net, noise(1, 8, 12), [MultiClassMask(1)])
    with pytest.raises(MetricError, match="TorchScript"):
        execution_order(case.objective)
