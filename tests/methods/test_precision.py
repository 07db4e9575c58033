from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.engine.network.state import frozen, own_modes
from esegeta_monai.engine.perturbation.checkpoint import ScoreCheckpoint
from esegeta_monai.explain.evaluation import Evaluator
from esegeta_monai.explain.record import DECIDES
from esegeta_monai.methods import (
    LRP,
    METHODS,
    XRAI,
    DeepLift,
    DeepLiftShap,
    GradCam,
    IntegratedGradients,
    LayerDeepLift,
    Method,
    Occlusion,
    Saliency,
    SmoothGrad,
    precision,
    run,
)
from esegeta_monai.methods.precision import AGREES, SURE, Agreement, agreement, full_precision
from esegeta_monai.targets import Box
from esegeta_monai.utils.distributed import Processes
from tests.support.networks import ELSEWHERE

WINDOWS = SlidingWindowInferer((8, 8), 2, 0.5, "gaussian")
TARGET = Box(0, (2, 2), (10, 10))
GRADIENT = Saliency(abs=False)
OCCLUSION = Occlusion(window=2)


def image() -> Tensor:
    return torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(0)) + 0.5


def draw(network: nn.Module, std: float = 0.3) -> nn.Module:
    torch.manual_seed(0)
    for p in network.parameters():
        nn.init.normal_(p, std=std)
    return network.eval()


class Offset(nn.Module):
    """A small change on top of a large output: the gradient does not see the offset, differences drown in it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = draw(nn.Conv2d(1, 1, 3, padding=1))
        with torch.no_grad():
            self.conv.bias.fill_(100.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Wild(nn.Module):
    """Phases of thousands: half precision rounds them by more than a period."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = draw(nn.Conv2d(1, 2, 3, padding=1), 300.0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.conv(x).float()).sum(1, keepdim=True)


class Overflow(nn.Module):
    """Variances beyond float16's largest number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = draw(nn.Conv2d(1, 4, 3, padding=1), 1e5)
        self.norm = nn.InstanceNorm2d(4)
        self.last = draw(nn.Conv2d(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.conv(x))))


def tame() -> nn.Module:
    return draw(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 3, padding=1)))


def tiny() -> nn.Module:
    """Gradients of 1e-10: nothing in float32, zero in float16 where a scaled cotangent meets the last weights."""
    return draw(nn.Sequential(*[nn.Conv2d(1, 1, 1) for _ in range(4)]), 1e-4)


def explained(network: nn.Module, methods: Sequence[Method], dtype: torch.dtype | None = torch.bfloat16, **given: Any):
    explainer = Explainer(network, WINDOWS, "cpu", dtype is not None, amp_kwargs={"dtype": dtype} if dtype else None)
    return list(explainer(image(), methods, [TARGET], **given))


def test_values_that_agree_do() -> None:
    x = torch.randn(1000, dtype=torch.float64)
    r, why = agreement(x.bfloat16(), x)
    assert why is None
    assert r == pytest.approx(float(np.corrcoef(x.bfloat16().double(), x)[0, 1]), abs=1e-12)


def test_zeros_of_both_do_not_make_two_maps_alike() -> None:
    a, b = torch.zeros(10_000), torch.zeros(10_000)
    a[:100] = 5 + torch.randn(100, generator=torch.Generator().manual_seed(0))
    b[:100] = 5 + torch.randn(100, generator=torch.Generator().manual_seed(1))
    assert np.corrcoef(a, b)[0, 1] > 0.95
    r, _ = agreement(a, b)
    assert r == pytest.approx(np.corrcoef(a[:100], b[:100])[0, 1], abs=1e-6)


@pytest.mark.parametrize(
    ("rough", "precise", "why"),
    [
        ([1.0, 2.0, 3.0], [1.0, 3.0, 2.0], f"correlation 0.5000 with float32 on the first window, below {SURE}"),
        ([1.0, float("inf"), 3.0], [1.0, 2.0, 3.0], "overflow: 1 values are not finite in half precision"),
        ([0.0, 0.0, 3.0], [1.0, 2.0, 3.0], "underflow: of 3 values that are not zero in float32, half precision keeps"),
        ([0.0, 0.0], [0.0, 0.0], "the first window is zero in float32"),
        ([1.0, 2.0], [3.0, 3.0], "do not vary"),
        ([1.0, 2.0], [3.0, float("nan")], "do not vary"),
    ],
)
def test_each_disagreement_has_its_reason(rough: list[float], precise: list[float], why: str) -> None:
    assert why in str(agreement(torch.tensor(rough), torch.tensor(precise))[1])


def test_methods_that_agree_run_under_autocast_and_record_the_correlation() -> None:
    half, full = explained(tame(), [GRADIENT, OCCLUSION]), explained(tame(), [GRADIENT, OCCLUSION], None)
    for a, b in zip(half, full):
        assert (a.record["amp"], a.record["amp_fallback"], a.record["warnings"]) == ("torch.bfloat16", None, [])
        assert SURE <= a.record["amp_correlation"] < 1
        assert not torch.equal(a.map, b.map)
        assert np.corrcoef(a.map.flatten(), b.map.flatten())[0, 1] >= AGREES
        assert (b.record["amp"], b.record["amp_correlation"], b.record["amp_fallback"]) == (None, None, None)


def test_noisy_gradients_fall_back_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        (a,) = explained(Wild(), [GRADIENT])
    (b,) = explained(Wild(), [GRADIENT], None)
    assert torch.equal(a.map, b.map)
    assert a.record["amp"] == "torch.bfloat16"  # as requested; the next two keys have the outcome
    assert a.record["amp_correlation"] < SURE
    assert a.record["amp_fallback"].startswith("correlation ")
    deviates, fallback = a.record["warnings"]
    assert "does not explain the prediction that is shown: switch amp off" in deviates
    assert fallback == f"computed in float32: {a.record['amp_fallback']}"
    assert f"Saliency runs in float32: {a.record['amp_fallback']}" in caplog.text


def test_small_differences_fall_back_where_gradients_need_not() -> None:
    """The raw scores correlate at 0.9999 here: what an occluder changes is what counts."""
    gradient, occlusion = explained(Offset(), [GRADIENT, OCCLUSION])
    assert gradient.record["amp_fallback"] is None
    assert occlusion.record["amp_fallback"].startswith("correlation ")
    _, full = explained(Offset(), [GRADIENT, OCCLUSION], None)
    assert torch.equal(occlusion.map, full.map)  # no unperturbed score of half precision among them


def test_nothing_is_measured_where_that_costs_the_map_in_float32() -> None:
    """One window is seen whole, and there are fewer steps or perturbations of it than would be computed twice."""
    network = tame()
    few, many = Occlusion(window=6), Occlusion(window=1)
    nine, ten, eleven = (
        IntegratedGradients(n_steps=n, baseline="zero") for n in (8, 9, 10)
    )  # the cheap copy takes five
    methods = [GRADIENT, few, nine, ten, many, eleven]
    for inferer, spared in ((None, [True] * 4 + [False] * 2), (WINDOWS, [False] * 6)):
        explainer = Explainer(network, inferer, "cpu", True)
        attributions = list(explainer(image(), methods, [TARGET]))
        assert [a.record["amp_fallback"] == precision.NOT_WORTH_IT for a in attributions] == spared
        value = 1  # once, F at the image in float32, which the prediction under autocast does not tell
        for a in (a for a, alone in zip(attributions, spared) if alone):
            (full,) = Explainer(network, inferer, "cpu")(image(), [a.method], [TARGET])
            own, value = (value, 0) if a.method.reads_image_value else (0, value)
            assert a.record["window_passes"] == full.record["window_passes"] + own
            assert torch.equal(a.map, full.map)


def test_methods_that_share_their_passes_are_decided_one_by_one() -> None:
    network = nn.Sequential(draw(nn.Conv2d(1, 3, 3, padding=1)), Wild())
    network[1].conv = draw(nn.Conv2d(3, 2, 3, padding=1), 300.0)
    activation = METHODS.create("LayerActivation(layer='0')")
    half = explained(network, [GRADIENT, activation])
    assert [a.record["amp_fallback"] is None for a in half] == [False, True]
    assert half[1].record["warnings"] == []
    for a, b in zip(half, explained(network, [GRADIENT, activation], None)):
        assert torch.equal(a.map, b.map) == (a.method is GRADIENT)


def test_underflow_is_caught() -> None:
    half, full = explained(tiny(), [GRADIENT], torch.float16)[0], explained(tiny(), [GRADIENT], None)[0]
    assert "underflow: of 36 values that are not zero in float32, float16 keeps 0" in half.record["amp_fallback"]
    assert half.record["status"] == "ok"
    assert torch.equal(half.map, full.map)


def test_overflow_falls_back() -> None:
    prediction = Overflow()(image()).detach()
    (half,) = explained(Overflow(), [GRADIENT], torch.float16, prediction=prediction)
    assert half.record["amp_fallback"].startswith("it fails in float16: float16 gradients overflow at every scale")
    assert torch.equal(half.map, explained(Overflow(), [GRADIENT], None, prediction=prediction)[0].map)


class Loses(Method, registered=False):
    """Agrees on the first window, and under autocast gives something else for the whole image."""

    produces = "input map"
    additive = True
    units = "target per voxel"

    def __init__(self, lost: Any) -> None:
        self.lost = lost
        self.__post_init__()

    def attribute(self, objective: Any) -> Tensor:
        maps = objective.image[None] + torch.zeros(objective.n_targets, 1, 1, 1)
        if objective.model.autocast_dtype is None or objective.context.sample is not None:
            return maps
        if isinstance(self.lost, Exception):
            raise self.lost
        return maps * self.lost


@pytest.mark.parametrize(
    ("lost", "why"),
    [
        (0.0, "underflow: the map is zero everywhere in bfloat16"),
        (float("nan"), "overflow: the map has values that are not finite in bfloat16"),
        (RuntimeError("not implemented for 'BFloat16'"), "it fails in bfloat16: RuntimeError: not implemented"),
    ],
)
def test_what_is_lost_after_the_first_window_is_computed_again(lost: Any, why: str) -> None:
    (attribution,) = explained(tame(), [Loses(lost)])
    assert attribution.record["amp_correlation"] == 1
    assert attribution.record["amp_fallback"].startswith(why)
    assert attribution.record["status"] == "ok"
    assert torch.equal(attribution.map.as_subclass(Tensor), image()[0])


def test_a_zero_map_is_reported_after_float32_confirms_it() -> None:
    network = draw(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 1, 1)))
    with torch.no_grad():
        network[0].bias.fill_(-1e3)
    (attribution,) = explained(network, [GRADIENT])
    assert attribution.record["status"] == "zero"
    assert "is zero in float32, so there is nothing to compare" in attribution.record["amp_fallback"]


class Watched(nn.Module):
    """Notes whether it runs under autocast."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.seen = network, set[bool]()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add(torch.is_autocast_enabled("cpu"))
        return self.network(x)


@pytest.mark.parametrize("name", [m.__name__ for m in METHODS if m.full_precision and m.__name__ not in ELSEWHERE])
def test_no_pass_of_a_method_in_full_precision_is_under_autocast(name: str) -> None:
    """Not inside another method either, nor inside an autocast of the user's own."""
    kind, cases = METHODS.get(name), [image().flip(2), image().flip(3)]
    offered = {"n_iter": 2, "n_samples": 2, "cases": cases, "layer": "network.0", "areas": 0.1}
    method = kind(**{n: v for n, v in offered.items() if n in kind.parameter_names()})
    network = draw(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1)))
    explainer = Explainer(Watched(network), WINDOWS, "cpu", True)
    (objective,) = [j.objective for j in explainer.judge(image(), [TARGET])]
    assert objective is not None
    for one in [method] if method.produces != "input map" else [method, SmoothGrad(method, n_samples=2)]:
        objective.model.network.seen.clear()
        with torch.autocast("cpu", torch.bfloat16), own_modes("cpu"), frozen(explainer.settings.network):
            run(one, objective)
        assert objective.model.network.seen == {False}
        run(GRADIENT, objective)
        assert objective.model.network.seen == {False, True}


def test_rules_run_in_float32_unasked() -> None:
    methods = [GRADIENT, DeepLift(), LRP()]
    for a, b in zip(explained(tame(), methods)[1:], explained(tame(), methods, None)[1:]):
        assert (a.record["amp"], a.record["amp_correlation"], a.record["amp_fallback"]) == (None, None, None)
        assert torch.equal(a.map, b.map)


@pytest.mark.parametrize("output", ["logit", "probability"])
def test_what_runs_in_float32_adds_up_to_f_in_float32(output: str) -> None:
    """Not to F of a prediction under autocast, which may differ by more than the image and its baseline do."""
    target = Box(1, (2, 2), (10, 10), output=output)
    network = draw(nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1)))
    methods = [DeepLift("mean"), DeepLiftShap("noise", n_samples=2), LayerDeepLift("0", baseline="mean")]
    for a in Explainer(network, WINDOWS, "cpu", amp=True)(image(), methods, [target]):
        change = a.record["value"] - a.record["baseline_value"]
        assert a.record["sum"] == pytest.approx(change, rel=1e-4)
        assert a.record.get("share_through_layer", 1.0) == pytest.approx(1, abs=1e-4)
        assert (a.record["completeness_gap"] or 0.0) <= 1e-4


def test_the_worst_target_decides_for_all() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tame, self.wild = tame(), Wild()

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.tame(x), self.wild(x)], 1)

    explainer = Explainer(Two(), WINDOWS, "cpu", amp=True)
    first, second = explainer(image(), [GRADIENT], [TARGET, Box(1, (2, 2), (10, 10))])
    assert first.record["amp_correlation"] >= SURE > second.record["amp_correlation"]
    assert first.record["amp_fallback"] == second.record["amp_fallback"]
    assert f"{second.record['amp_correlation']:.4f}" in second.record["amp_fallback"]


def test_methods_inside_others_are_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    measure = precision.measure
    monkeypatch.setattr(precision, "measure", lambda *args: asked.append(1) or measure(*args))
    (attribution,) = explained(tame(), [SmoothGrad(GRADIENT, n_samples=3)])
    assert len(asked) == 1
    assert attribution.record["amp_correlation"] >= SURE


def test_all_ranks_decide_as_the_first_one() -> None:
    class Second(Processes):
        """The second process, whose own measurement must not be used."""

        def gather(self, value: Any) -> list[Any]:
            first = [Agreement([0.5], "of the first rank")] if value and isinstance(value, list) else value
            return [first, value]

    explainer = Explainer(tame(), WINDOWS, "cpu", amp=True)
    (objective,) = [j.objective for j in explainer.judge(image(), [TARGET])]
    assert objective is not None
    objective.context.processes = Second()
    outcome = run(GRADIENT, objective)
    assert outcome.notes["amp_fallback"] == "of the first rank"
    assert torch.equal(outcome.maps, run(GRADIENT, full_precision(objective)).maps)


def test_the_cheap_copy_is_the_same_method_with_fewer_passes() -> None:
    assert XRAI(n_segments=(3,), n_steps=64).cheap_copy().parameters == XRAI(n_segments=(3,), n_steps=4).parameters
    inner = SmoothGrad(IntegratedGradients(tolerance=1e-3), n_samples=9).cheap_copy()
    assert (inner.n_samples, inner.method.n_steps, inner.method.tolerance) == (4, 4, None)
    assert IntegratedGradients(n_steps=2).cheap_copy().n_steps == 2
    assert GRADIENT.cheap_copy() is GRADIENT


def test_what_decides_a_map_does_not_depend_on_what_was_measured() -> None:
    """So that a finished map with a fallback is skipped like any other."""
    asked: list[dict[str, Any]] = []
    explainer = Explainer(Wild(), WINDOWS, "cpu", amp=True)
    (attribution,) = explainer(image(), [GRADIENT], [TARGET], skip=lambda a: bool(asked.append(dict(a.record))))
    assert attribution.record["amp_fallback"] is not None
    assert {k: asked[0].get(k) for k in DECIDES} == {k: attribution.record.get(k) for k in DECIDES}


def test_scores_kept_on_disk_are_of_one_precision(tmp_path: Any) -> None:
    """A run that fell back does not go on with scores of one that did not."""
    half = Explainer(tame(), WINDOWS, "cpu", amp=True)
    (objective,) = [j.objective for j in half.judge(image(), [TARGET])]
    assert objective is not None
    objective.context.checkpoint = ScoreCheckpoint(tmp_path, {"image": "a"})
    precise = full_precision(objective).checkpoint
    assert precise is not None
    assert precise.path("boxes") != objective.context.checkpoint.path("boxes")


def test_metrics_ask_without_autocast() -> None:
    values = []
    for amp in (False, True):
        evaluator = Evaluator(Explainer(Offset(), WINDOWS, "cpu", amp), ["Infidelity", "Deletion"], with_controls=False)
        result = evaluator(MetaTensor(image()[0]), [OCCLUSION], [TARGET])  # its map is float32's, see above
        values.append([row["value"] for row in result.rows])
    assert values[0] == values[1]


def test_a_cam_is_measured_on_its_first_window_alone() -> None:
    (attribution,) = explained(tame(), [GradCam(layer="0", relu=False)])
    assert attribution.record["amp_correlation"] >= SURE
    assert (
        attribution.record["window_passes"] == 8
    )  # four windows each for weights and map: what is measured comes beside


def test_other_scores_in_float32_compare_with_the_image_in_float32() -> None:
    """F(image) of a derived objective has the precision of its windows, not that of the given prediction."""
    half = Explainer(tame(), WINDOWS, "cpu", amp=True)
    (objective,) = [j.objective for j in half.judge(image(), [TARGET])]
    assert objective is not None
    precise = full_precision(objective)
    with frozen(objective.model.network):
        expected = precise.value(objective.image[None])[:, 0]
        derived = precise.derive(scores=precise.scores)
        assert derived.recompute_value
        assert torch.equal(derived.image_values(), expected)
        assert not torch.equal(objective.image_values(), expected)
