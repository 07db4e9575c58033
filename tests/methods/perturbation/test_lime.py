"""LIME against the lime package on 2D RGB, in 3D against a linear truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lime.lime_image import LimeImageExplainer
from monai.inferers import SimpleInferer

from esegeta_monai.engine.network.state import frozen
from esegeta_monai.errors import UsageError
from esegeta_monai.methods import Lime, run
from esegeta_monai.targets import ClassScore
from tests.support.networks import Computed
from tests.support.objectives import Naive
from tests.support.shapley import Quadratic, case_of
from tests.support.tensors import assert_equal, noise

SHAPE = (3, 20, 24)


class GivenSamples(Lime):
    """`Lime` with the samples of another run, set after construction."""

    given = np.empty((0, 0))

    def coalitions(self, game):
        assert len(game.features) == self.given.shape[1]
        return self.given.astype(bool)


@pytest.mark.parametrize("selection", ["none", "highest_weights"])
@pytest.mark.parametrize("hide_color", [None, 0.25])
def test_equals_lime_image_explainer(hide_color, selection):
    torch.manual_seed(0)
    image = torch.rand(SHAPE, dtype=torch.float64)
    net = Quadratic(image.numel())
    segments = np.arange(20)[:, None] // 5 * 6 + np.arange(24) // 4
    features = 24

    def predict(batch: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return torch.softmax(net(torch.from_numpy(batch).movedim(-1, 1)), 1).numpy()

    samples = np.random.RandomState(5).randint(0, 2, 80 * features).reshape(80, features)
    samples[0] = 1
    peer = LimeImageExplainer(feature_selection=selection, random_state=np.random.RandomState(5))
    options = {"top_labels": None, "num_samples": 80, "hide_color": hide_color, "random_seed": 1}
    kept = 1000 if selection == "none" else 5
    expected = peer.explain_instance(
        image.movedim(0, -1).numpy(), predict, (1,), num_features=kept, segmentation_fn=lambda _: segments, **options
    )
    wanted = np.zeros(features)
    for j, weight in expected.local_exp[1]:
        wanted[j] = weight

    baseline = "feature mean" if hide_color is None else hide_color
    labels = torch.from_numpy(segments + 1)
    method = GivenSamples(
        80, labels, baseline, num_features=None if selection == "none" else 5, feature_selection=selection
    )
    method.given = samples
    with frozen(net):
        result = run(method, case_of(net, image, ClassScore(1, output="probability")).objective)
    actual = torch.tensor([row["value"] for row in result.note(0)["features"]], dtype=torch.float64)
    assert_equal(actual, torch.from_numpy(wanted), 1e-10)
    assert result.note(0)["r2"] == pytest.approx(expected.score, rel=1e-10)
    assert result.note(0)["intercept"] == pytest.approx(expected.intercept[1], rel=1e-10)
    assert int((actual != 0).sum()) == (features if selection == "none" else 5)


def test_a_linear_network_in_3d_gives_its_own_weights():
    """Without ridge penalty the regression of a linear function is the function: F(feature on) − F(feature off)."""
    weights = noise(2, 4, 6, 6, seed=4)

    def linear(x: torch.Tensor) -> torch.Tensor:
        return (x * weights).flatten(1).sum(1, keepdim=True)

    image = noise(2, 4, 6, 6)
    case = Naive(Computed(linear), image, [ClassScore(0)], SimpleInferer())
    result = run(Lime(200, "grid(size=2)", baseline=0.5, alpha=0.0), case.objective)
    share = (weights * (image - 0.5)).sum(0).reshape(2, 2, 3, 2, 3, 2).sum((1, 3, 5)).flatten()
    assert_equal(torch.tensor([r["value"] for r in result.note(0)["features"]], dtype=torch.float64), share, 1e-9)
    assert result.note(0)["r2"] == pytest.approx(1, abs=1e-9)
    assert result.maps.shape == (1, 1, 4, 6, 6)


def test_too_few_samples():
    with pytest.raises(UsageError, match="two samples"):
        Lime(n_samples=1)
