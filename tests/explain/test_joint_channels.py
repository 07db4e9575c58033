"""Methods that perturb all channels together give one map, which does not name a channel that the network ignores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.methods import (
    FeatureAblation,
    KernelShap,
    Lime,
    Occlusion,
    Rise,
    Saliency,
    ShapleyValueSampling,
)
from esegeta_monai.output.writer import ResultWriter
from esegeta_monai.targets import ClassScore
from esegeta_monai.utils.files import read_json
from tests.explain.support import only


class FirstOnly(nn.Module):
    """A linear classifier that reads the first of two contrasts only."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.linear = nn.Linear(512, 2)

    def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        return self.linear(a[:, 0].flatten(1))


X = torch.rand(1, 2, 8, 8, 8, generator=torch.Generator().manual_seed(1))
JOINT = [
    Occlusion(4, baseline=0.0),
    FeatureAblation("grid(4)", baseline=0.0),
    Rise(n_masks=8),
    Lime(n_samples=20, feature_mask="grid(4)"),
    KernelShap(n_samples=254, feature_mask="grid(4)", baseline=0.0),
    ShapleyValueSampling(n_samples=4, feature_mask="grid(4)", baseline=0.0),
]


@pytest.mark.parametrize("several_inputs", [False, True])
@pytest.mark.parametrize("method", JOINT, ids=lambda m: type(m).__name__)
def test_channels_that_are_perturbed_together_have_one_map(method: Any, several_inputs: bool) -> None:
    image: Any = {"a": X[:, :1], "b": X[:, 1:]} if several_inputs else X
    explainer = Explainer(FirstOnly(), channel_names=["T1", "T2"])
    result = only(explainer(image, [method], [ClassScore(1)]))
    assert tuple(result.map.shape) == (1, 8, 8, 8)
    assert (result.record["channels"], result.record["channel_names"]) == ("all", ["all channels"])
    assert result.input is None
    if method.additive:
        with torch.no_grad():
            change = float(FirstOnly()(X)[0, 1] - FirstOnly()(0 * X)[0, 1])
        assert float(result.map.sum(dtype=torch.float64)) == pytest.approx(change, rel=1e-5)


@pytest.mark.parametrize("method", [Occlusion(4, baseline=0.0, per_channel=True), FeatureAblation("channels", 0.0)])
def test_channels_that_are_perturbed_alone_have_their_own_map(method: Any) -> None:
    result = only(Explainer(FirstOnly(), channel_names=["T1", "T2"])(X, [method], [ClassScore(1)]))
    assert tuple(result.map.shape) == (2, 8, 8, 8)
    assert "channels" not in result.record
    assert result.record["channel_names"] == ["T1", "T2"]
    first, second = result.map.abs().amax((1, 2, 3)).tolist()
    assert second <= 1e-6 * first


def test_the_joint_map_is_written_with_one_channel_and_its_sum(tmp_path: Any) -> None:
    explainer = Explainer(FirstOnly(), channel_names=["T1", "T2"], on_error="record")
    methods, targets = [JOINT[0], JOINT[4], Saliency()], [ClassScore(1)]
    writer = ResultWriter(tmp_path, methods, targets)
    with writer.run:
        writer.explain(explainer, _image(), "case", methods, targets)
    records = {r["method"]: r for r in map(read_json, sorted(tmp_path.rglob("*_attr.json"))) if r is not None}
    assert {name: r["status"] for name, r in records.items()} == dict.fromkeys(records, "ok")
    assert records["Occlusion"]["channels"] == records["KernelShap"]["channels"] == "all"
    assert records["Saliency"]["channel_names"] == ["T1", "T2"]
    shap = records["KernelShap"]
    assert shap["sum_scan_grid"] == pytest.approx(shap["value"] - shap["baseline_value"], rel=1e-4)


def _image() -> Any:
    from monai.data import MetaTensor

    return MetaTensor(X[0], affine=torch.eye(4, dtype=torch.float64))
