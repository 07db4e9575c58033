"""The methods of a case in one run: shared passes, failures, time limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esegeta_monai import Attribution, Explainer
from esegeta_monai.errors import MethodTimeout, TargetError
from esegeta_monai.methods import (
    LRP,
    GradCam,
    InputXGradient,
    LayerActivation,
    Occlusion,
    Rise,
    Saliency,
)
from esegeta_monai.methods.base import Method
from esegeta_monai.targets import MultiClassMask, Voxel
from tests.explain.support import RECORDED, SLIDING, Broken, Spy, image


def test_methods_that_look_at_the_same_windows_share_passes() -> None:
    """Saliency, InputXGradient, GradCam and LayerActivation cost no more window passes than GradCam alone."""
    costs = []
    for methods in ([GradCam(layer="first")], [Saliency(), InputXGradient(), GradCam(layer="first"),
                                               LayerActivation(layer="first")]):  # fmt: skip
        network = Spy()
        prediction = SLIDING(image(), network).detach()
        network.seen = 0
        result = list(
            Explainer(network, SLIDING, checks=False)(image(), methods, [MultiClassMask(1)], prediction=prediction)
        )
        assert all(a.status == "ok" for a in result)
        assert result[0].record["window_passes"] == network.seen - 2  # two windows trace the layers, once a network
        costs.append(network.seen)
    assert costs[1] == costs[0] > 0
    assert result[0].record["passes_shared_with"] == ["Saliency", "InputXGradient", "GradCam", "LayerActivation"]


class Slow(Method):
    """Takes its time, looking at the clock between windows as all methods do."""

    produces = "input map"
    additive = False
    units = "target per unit of image intensity"

    def __init__(self, name: str | None = None) -> None:
        self.name = name

    def attribute(self, objective: Any) -> Tensor:
        maps = objective.new_maps()
        for _ in range(10_000):
            maps += objective.gradient(objective.image[None]).maps[:, 0]
        return maps


def test_time_limit_ends_a_method_and_the_next_goes_on() -> None:
    explainer = Explainer(Spy(), SLIDING, time_limit=0.3, on_error="record")
    result = list(explainer(image(), [Slow(), Occlusion(window=8)], [MultiClassMask(1)]))
    assert [a.status for a in result] == ["timeout", "ok"]
    assert "time limit of 0.3 s" in result[0].record["reason"]
    assert 0.3 <= result[0].record["seconds"] < 5
    with pytest.raises(MethodTimeout):
        list(Explainer(Spy(), SLIDING, time_limit=0.05)(image(), [Slow()], [MultiClassMask(1)]))


def test_on_error_record_keeps_what_works() -> None:
    result = list(
        Explainer(Spy(), SLIDING, on_error="record")(
            image(), [Broken(), Saliency()], [MultiClassMask(1), MultiClassMask(7)]
        )
    )
    by = {(a.method.name, a.target.parameters["class_index"]): a for a in result}
    assert {k: a.status for k, a in by.items()} == {
        ("Broken", 1): "failed",
        ("Broken", 7): "failed",
        ("Saliency", 1): "ok",
        ("Saliency", 7): "failed",
    }
    assert by["Broken", 1].record["reason"] == "ZeroDivisionError: a bug"
    assert isinstance(by["Broken", 1].error, ZeroDivisionError)
    assert isinstance(by["Saliency", 7].error, TargetError)


def test_skip_is_asked_before_anything_is_computed() -> None:
    network = Spy()
    prediction = SLIDING(image(), network).detach()
    network.seen = 0
    asked: list[Attribution] = []

    def skip(attribution: Attribution) -> bool:
        assert network.seen == 0
        asked.append(attribution)
        return attribution.method.name == "Saliency" or attribution.label.endswith("class0")

    options = {"prediction": prediction, "skip": skip}
    result = list(
        Explainer(network, SLIDING, checks=False)(
            image(), [Saliency(), GradCam()], ["MultiClassMask(0)", "MultiClassMask(1)"], **options
        )
    )
    assert [(a.method.name, a.label) for a in result] == [("GradCam", "MultiClassMask-class1")]
    assert len(asked) == 4
    assert all(a.map is None and set(a.record) >= RECORDED for a in asked)


@pytest.mark.parametrize("bad", [Occlusion(4, baseline="gone.nii.gz"), Rise(10, grid=(2, 2))])
def test_a_progress_bar_does_not_spread_a_failure(bad: Method, capsys: pytest.CaptureFixture[str]) -> None:
    """The passes are counted before the run: what fails there failed all methods of the case."""
    explainer = Explainer(Spy(), SLIDING, on_error="record", progress=True)
    methods = [bad, Saliency(), Occlusion(6, name="second")]
    result = {a.method.name: a for a in explainer(image(), methods, [Voxel(1, index=(6, 6, 6))])}
    assert {n: a.status for n, a in result.items()} == {bad.name: "failed", "Saliency": "ok", "second": "ok"}
    passes = result["second"].record["window_passes"]
    assert f"{passes}/{passes} [" in capsys.readouterr().err


@pytest.mark.parametrize("amp", [False, True])
def test_the_precision_of_each_map_is_stated(amp: bool) -> None:
    methods = [Saliency(), LRP(), Occlusion(4)]
    image = torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(3)
    network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 1)).eval()
    for attribution in Explainer(network, amp=amp)(image, methods, [MultiClassMask(0)]):
        record = attribution.record
        (check,) = [c for c in record["checks"] if c["check"] == "precision"]
        in_float32 = attribution.method.full_precision or record["amp_fallback"] is not None
        assert check["verdict"] == ("handled" if amp and in_float32 else "passed")
        assert ("autocast (bfloat16)" in check["text"]) == amp
        assert attribution.method.name != "LRP" or ("in float32: the method needs it" in check["text"]) == amp


def test_a_given_prediction_of_unknown_precision_is_not_checked() -> None:
    image = torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    network = nn.Conv2d(1, 2, 3, padding=1).eval()
    with torch.no_grad():
        prediction = network(image)
    explainer = Explainer(network)
    for changed, verdict in ((prediction, "passed"), (1.01 * prediction, "not checked"), (2 * prediction, "warned")):
        (attribution,) = explainer(image, [Saliency()], [MultiClassMask(0)], prediction=changed)
        assert [c["verdict"] for c in attribution.record["checks"] if c["check"] == "precision"] == [verdict]
