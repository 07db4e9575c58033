"""Influence of training cases: steps of SGD, ridge regression, and labels that were flipped."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from monai.inferers import SlidingWindowInferer
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from scipy.stats import spearmanr
from torch import nn

from esegeta_monai import Explainer
from esegeta_monai.engine.network.state import weights_hash
from esegeta_monai.errors import InputError, NetworkError, UsageError
from esegeta_monai.explain import EnsembleInferer
from esegeta_monai.explain.influence import Checkpoint, ExplainedCase, InfluenceRun, TracIn, Trak, influence
from esegeta_monai.explain.training_loss import TrainingCase, TrainingLoss
from esegeta_monai.targets import MultiClassMask
from tests.support.influence import auc, flipped_labels, half_squared


def weights_of(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def segmenter(dims: int) -> nn.Module:
    torch.manual_seed(0)
    return UNet(dims, 1, 2, (4, 8), (2,), norm="batch").double().eval()


def segmented(dims: int, count: int) -> list[TrainingCase]:
    generator = torch.Generator().manual_seed(5)
    cases = []
    for n in range(count):
        image = torch.randn((1,) + (8,) * dims, generator=generator, dtype=torch.float64)
        cases.append(TrainingCase(f"{n}", image, (image > 0.5).double()))
    return cases


def relative_error(dims: int, rate: float, steps: int = 4) -> float:
    """By how much the sum of ``η ∇ℓ·∇ℓ'`` over steps of SGD with one case misses the fall of another case's loss."""
    network, (asked, *cases) = segmenter(dims), segmented(dims, steps + 1)
    function = DiceCELoss(to_onehot_y=True, softmax=True)
    loss, explainer = TrainingLoss(function), Explainer(network, checks=False)
    value = [float(function(network(asked.image[None]), asked.label[None]))]
    total = 0.0
    for case in cases:
        result = influence(explainer, [asked], [case], loss, [Checkpoint(weights_of(network), rate)], TracIn("dot"))
        total += float(result.scores[0, 0])
        gradients = torch.autograd.grad(
            function(network(case.image[None]), case.label[None]), list(network.parameters())
        )
        with torch.no_grad():
            for p, g in zip(network.parameters(), gradients):
                p -= rate * g
    value.append(float(function(network(asked.image[None]), asked.label[None])))
    return abs(total - (value[0] - value[1])) / abs(value[0] - value[1])


@pytest.mark.parametrize("dims", [2, 3])
def test_tracin_is_the_fall_of_the_loss_to_first_order(dims: int) -> None:
    errors = [relative_error(dims, rate) for rate in (2e-2, 1e-2, 5e-3)]
    print(dims, errors)
    assert errors[-1] < 0.05
    for larger, smaller in pairwise(errors):
        assert 1.8 < larger / smaller < 2.2


@pytest.mark.parametrize("form", ["dot", "cosine"])
@pytest.mark.parametrize("dims", [2, 3])
def test_a_target_through_windows_by_autograd(dims: int, form: str) -> None:
    """Two checkpoints, patches smaller than the case, a mask frozen at the network's own weights."""
    network = segmenter(dims)
    inferer = SlidingWindowInferer((8,) * dims, 2, 0.5, "gaussian")
    image = torch.rand((1, 1) + (12,) * dims, dtype=torch.float64)
    rng = torch.Generator().manual_seed(2)
    label = (torch.rand((1,) + (12,) * dims, generator=rng, dtype=torch.float64) > 0.5).double()
    case = TrainingCase("z", image[0] + 0.1, label)
    function = DiceCELoss(to_onehot_y=True, softmax=True)
    before = weights_hash(network)
    checkpoints = [
        Checkpoint({k: v + s * torch.ones_like(v) for k, v in weights_of(network).items()}, s) for s in (0.01, 0.02)
    ]
    with torch.no_grad():
        predicted = inferer(image, network)[0].argmax(0)
    most = int(predicted.flatten().mode()[0])
    mask = predicted == most
    target = MultiClassMask(most, output="probability")
    loss = TrainingLoss(function, (8,) * dims, patches=100)
    asked = ExplainedCase("x", image, [target])
    result = influence(Explainer(network, inferer, checks=False), [asked], [case], loss, checkpoints, TracIn(form))
    assert weights_hash(network) == before

    other = segmenter(dims)
    sums, cosines, own = 0.0, 0.0, 0.0
    for checkpoint in checkpoints:
        other.load_state_dict(checkpoint.weights)
        parameters = list(other.parameters())
        f = inferer(image, other)[0].softmax(0)[most][mask].sum()
        starts = [0, 4]
        values = []
        for start in torch.cartesian_prod(*[torch.tensor(starts)] * dims).reshape(-1, dims).tolist():
            at = (None, slice(None), *(slice(s, s + 8) for s in start))
            values.append(function(other(case.image[at]), case.label[at]))
        value = sum(values) / len(values)
        df, dl = (torch.cat([g.flatten() for g in torch.autograd.grad(v, parameters)]) for v in (f, value))
        sums -= checkpoint.learning_rate * float(df @ dl)
        cosines -= checkpoint.learning_rate * float(df @ dl / df.norm() / dl.norm()) / 0.03
        own += checkpoint.learning_rate * float(dl @ dl)
    assert result.scores[0, 0] == pytest.approx(sums if form == "dot" else cosines, rel=1e-9)
    assert result.self_influence[0] == pytest.approx(own, rel=1e-9)


def test_trak_without_projection_is_the_influence_function_of_ridge_regression() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 12)), rng.normal(size=40)
    asked = rng.normal(size=12)
    penalty = 3.0

    def solve(extra: int | None = None, weight: float = 0.0) -> np.ndarray:
        w = np.ones(40)
        if extra is not None:
            w[extra] += weight
        return np.linalg.solve(x.T @ (w[:, None] * x) + penalty * np.eye(12), x.T @ (w * y))

    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 1, bias=False)).double()
    with torch.no_grad():
        network[1].weight.copy_(torch.from_numpy(solve())[None])
    cases = [
        TrainingCase(f"{n}", torch.from_numpy(r).reshape(1, 3, 4), torch.tensor([v]))
        for n, (r, v) in enumerate(zip(x, y))
    ]
    method = Trak(None, penalty / float((x**2).sum(1).mean()), "residual")
    explained = ExplainedCase("x", torch.from_numpy(asked).reshape(1, 1, 3, 4), ["ClassScore(0)"])
    result = influence(
        Explainer(network, checks=False, head="raw"), [explained], cases, TrainingLoss(half_squared),
        [Checkpoint(weights_of(network))], method,
    )  # fmt: skip
    closed = -(x @ np.linalg.solve(x.T @ x + penalty * np.eye(12), asked)) * (x @ solve() - y)
    assert np.abs(result.scores[0] - closed).max() <= 1e-9 * np.abs(closed).max()
    assert spearmanr(result.scores[0], closed).statistic == pytest.approx(1.0, abs=1e-12)
    refitted = np.array([(solve(n, 1e-4) - solve(n, -1e-4)) @ asked / 2e-4 for n in range(40)])
    assert np.abs(result.scores[0] - refitted).max() <= 1e-6 * np.abs(refitted).max()
    projected = influence(
        Explainer(network, checks=False, head="raw"), [explained], cases, TrainingLoss(half_squared),
        [Checkpoint(weights_of(network))], Trak(4096, method.ridge, "residual"),
    )  # fmt: skip
    assert spearmanr(projected.scores[0], closed).statistic > 0.95


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("method", [TracIn(), Trak(512)], ids=["TracIn", "TRAK"])
def test_flipped_labels_have_a_large_self_influence(dims: int, method: TracIn | Trak) -> None:
    result, wrong = flipped_labels(dims, method)
    own = auc(result.self_influence, wrong)
    order = np.random.default_rng(0)
    chance = np.mean([auc(order.random(len(wrong)), wrong) for _ in range(100)])
    print(dims, method, own, chance, auc(result.losses, wrong))
    assert own >= 0.9
    assert abs(chance - 0.5) < 0.05


def test_both_sides_of_the_trak_system() -> None:
    """More cases than numbers, and fewer: one formula."""
    from esegeta_monai.explain.influence import _solved

    for n in (3, 30):
        rows, vectors = torch.randn(n, 8, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
        system = rows.T @ rows + 0.1 * torch.eye(8, dtype=torch.float64)
        torch.testing.assert_close(_solved(rows, 0.1, vectors) @ system, vectors)


def test_order_names_and_errors() -> None:
    network = segmenter(2)
    cases = segmented(2, 2)
    loss, checkpoints = TrainingLoss(DiceCELoss(to_onehot_y=True, softmax=True)), [Checkpoint(weights_of(network))]
    explainer = Explainer(network, checks=False)
    run = InfluenceRun(explainer, loss, checkpoints)
    with pytest.raises(UsageError, match="no explained case"):
        run.add(cases[0])
    assert run.explain(ExplainedCase("x", cases[0].image[None], ["ThresholdMask(1e9)"])) == []
    assert run.explain(ExplainedCase("x", cases[0].image[None], ["MultiClassMask(1)"])) == ["MultiClassMask-class1"]
    with pytest.raises(UsageError, match="no training case"):
        run.result()
    run.add(cases[0])
    with pytest.raises(UsageError, match="added before"):
        run.add(cases[0])
    with pytest.raises(UsageError, match="before the first"):
        run.explain(cases[1])
    run.add(cases[1])
    rows = run.result().rows()
    assert [(r["case"], r["target"], r["rank"]) for r in rows] == [
        ("x", "MultiClassMask-class1", 1),
        ("x", "MultiClassMask-class1", 2),
    ]
    assert rows[0]["score"] >= rows[1]["score"]
    assert all(-1 <= r["score"] <= 1 for r in rows)
    with pytest.raises(UsageError, match="at least one checkpoint"):
        InfluenceRun(explainer, loss, [])
    with pytest.raises(NetworkError, match="has no weight"):
        InfluenceRun(explainer, loss, [Checkpoint({})])
    members = EnsembleInferer(members=[network, segmenter(2)])
    with pytest.raises(UsageError, match="one member"):
        InfluenceRun(Explainer(network, members), loss, checkpoints)
    for wrong in (
        lambda: TracIn("sum"),
        lambda: Trak(ridge=0.0),
        lambda: Trak(output="no"),
        lambda: Checkpoint({}, 0.0),
    ):
        with pytest.raises(UsageError):
            wrong()


def test_a_negative_loss_has_no_margin() -> None:
    network, (case, *_) = segmenter(2), segmented(2, 1)
    run = InfluenceRun(
        Explainer(network, checks=False), TrainingLoss(lambda out, label: -out.square().mean()),
        [Checkpoint(weights_of(network))], Trak(64),
    )  # fmt: skip
    run.explain(ExplainedCase("x", case.image[None], ["MultiClassMask(1)"]))
    with pytest.raises(InputError, match="output='loss'"):
        run.add(case)
