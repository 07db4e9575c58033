"""Every metric on a simulated device returns what it returns on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
from monai.data import MetaTensor

from esegeta_monai import Explainer
from esegeta_monai.explain.evaluation import EvaluationResult, Evaluator
from esegeta_monai.metrics import METRICS, Metric
from tests.support.fake_device import FAKE, fake_device
from tests.test_devices import CLASS, LABEL, SETTINGS, image

PARAMETERS = {"features": "grid(size=6)", "n_samples": 10, "steps": 3}


def metric(name: str) -> Metric:
    kind = METRICS.get(name)
    return kind(**{n: v for n, v in PARAMETERS.items() if n in kind.parameter_names()})


def judged(name: str, device: Any = "cpu", volumes: Any = None) -> EvaluationResult:
    setting = SETTINGS["UNet"]
    explainer = Explainer(setting.network(device), setting.inferer, device, volume_device=volumes)
    scan = MetaTensor(image(0, *setting.shape)[0]).to(device if volumes is None else volumes)
    evaluator = Evaluator(explainer, [metric(name)], with_controls=name == "Deletion")
    return evaluator(scan, ["InputXGradient"], [CLASS], label=LABEL.to(scan.device))


@pytest.mark.parametrize("name", [m.__name__ for m in METRICS])
def test_figures_are_those_of_the_cpu(name: str) -> None:
    here = judged(name)
    assert here.rows
    assert not here.failed
    for volumes in (None, "cpu"):
        with fake_device():
            there = judged(name, FAKE, volumes)
        assert not there.failed
        for actual, expected in zip([*there.rows, *there.regions], [*here.rows, *here.regions], strict=True):
            same = {k: v for k, v in expected.items() if k != "seconds"}
            assert {k: actual[k] for k in same if not isinstance(same[k], float)} == {
                k: v for k, v in same.items() if not isinstance(v, float)
            }
            figures = {k: v for k, v in same.items() if isinstance(v, float)}
            assert {k: actual[k] for k in figures} == pytest.approx(figures, rel=1e-9, abs=1e-9, nan_ok=True)
