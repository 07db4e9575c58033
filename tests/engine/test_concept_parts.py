"""Non-negative weights against SciPy, and F without a concept against a network whose layer was edited by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.inferers import SlidingWindowInferer
from scipy.optimize import nnls

from esegeta_monai.engine.concept_parts import nonnegative_weights, weakened_values
from esegeta_monai.engine.network.state import frozen
from esegeta_monai.engine.windows.inferers import as_inferer
from esegeta_monai.errors import MethodError
from esegeta_monai.targets import MultiClassMask
from tests.engine.test_layer_regions import build
from tests.support.objectives import objective_of
from tests.support.tensors import DOUBLE, close, noise


@pytest.mark.parametrize("k", [1, 3, 6])
def test_weights_are_those_of_scipy(k):
    values, basis = noise(20, 8), noise(k, 8, seed=1)
    expected = np.stack([nnls(basis.T.numpy(), v.numpy())[0] for v in values])
    close(nonnegative_weights(values, basis), torch.from_numpy(expected), 1e-8)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", ["segmentation", "classification"])
@pytest.mark.parametrize("apart", [True, False])
def test_equals_the_whole_volume_with_the_layer_edited_by_hand(kind, dims, apart):
    net, image, inferer, target = build(kind, dims)
    objective = objective_of(net, image, [target], inferer)
    basis = noise(3, 10 if apart else 5, seed=4).abs()
    factors = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0], [0.3, 0.9, 0.0]], dtype=DOUBLE)
    with frozen(net):
        values = weakened_values(objective, "layer", basis, factors)[0]
    expected = []
    for factor in factors:

        def edit(module, args, out, factor=factor):
            rows = out.detach().movedim(1, -1).reshape(-1, 5)
            features = torch.cat([rows.relu(), (-rows).relu()], 1) if apart else rows
            weights = torch.from_numpy(np.stack([nnls(basis.T.numpy(), r.numpy())[0] for r in features]))
            directions = basis[:, :5] - basis[:, 5:] if apart else basis
            kept = rows - (weights * (1 - factor)) @ directions
            return kept.reshape(len(out), *out.shape[2:], 5).movedim(-1, 1)

        handle = net.layer.register_forward_hook(edit)
        with torch.no_grad():
            prediction = as_inferer(inferer)(image[None], lambda x: net(x).clone())[0]
        handle.remove()
        (score,) = objective.scores
        expected.append(score.value(score.crop(prediction)))
    close(values, torch.stack(expected), 1e-8)
    assert float(values[0]) == pytest.approx(float(objective.image_values()[0]), rel=1e-10)
    assert abs(float(values[2] - values[0])) > 1e-3 * abs(float(values[0]))


def test_a_target_that_is_not_linear_and_concepts_of_another_layer_are_refused():
    net, image, inferer, _ = build("segmentation", 2)
    objective = objective_of(net, image, [MultiClassMask(1, output="probability")], inferer)
    with pytest.raises(MethodError, match="output='logit'"):
        weakened_values(objective, "layer", torch.ones(1, 5), torch.ones(1, 1))
    objective = objective_of(net, image, [MultiClassMask(1)], SlidingWindowInferer((8, 8), 2))
    with pytest.raises(MethodError, match="another layer"), frozen(net):
        weakened_values(objective, "layer", torch.ones(1, 4), torch.ones(1, 1))
