"""Games: the reference image, split halves, and work shared between coalitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from esegeta_monai.engine.feature_masks import Features
from esegeta_monai.engine.network.state import frozen
from esegeta_monai.engine.perturbation import masks as coalitions_module
from esegeta_monai.engine.perturbation.game import Game, reference_image, split_half
from esegeta_monai.engine.perturbation.masks import Segments
from esegeta_monai.targets import MultiClassMask
from tests.support.networks import small
from tests.support.objectives import Naive, perturbed
from tests.support.tensors import assert_equal, noise


def test_feature_means():
    case = Naive(small(2, 2), noise(2, 4, 6))
    labels = torch.tensor([[0, 0, 0, 1, 1, -1]]).expand(1, 4, 6).contiguous()
    baseline, reference = reference_image(case.objective, Features(labels, ["a", "b"]), "feature mean")
    assert baseline is None
    assert_equal(reference[1, :, :3], case.image[1, :, :3].mean().expand(4, 3))
    assert torch.equal(reference[:, :, 5], case.image[:, :, 5])
    game = Game.of(case.objective, labels[0] + 1, 0.5)
    off = game.segments(np.array([[False, True]]))
    assert torch.equal(off.apply(0, case.image, (slice(0, 4), slice(0, 6))), perturbed(off, 0, case.image))


def test_split_half_correlation():
    a = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]])
    assert split_half(a, -2 * a) == [pytest.approx(-1), None]


def test_what_coalitions_share_is_looked_at_once(monkeypatch):
    """Labels and reference are hashed once, and each window is looked at once, however many sets of coalitions come."""
    case = Naive(small(), noise(1, 8, 24), [MultiClassMask(1)])
    game = Game.of(case.objective, "grid(size=4)", "constant(0.1)")
    hashed, looked_at = [], []
    digest, differing = coalitions_module.digest, coalitions_module._differing
    monkeypatch.setattr(coalitions_module, "digest", lambda *t: hashed.append(t) or digest(*t))
    monkeypatch.setattr(coalitions_module, "_differing", lambda *t: looked_at.append(t) or differing(*t))
    drawn = np.random.default_rng(1).random((3, 5, len(game.features))) > 0.5
    with frozen(case.net):
        values = [game.values(coalitions) for coalitions in drawn]
        again = [game.values(coalitions) for coalitions in drawn]
    assert len(hashed) == 1
    assert len(looked_at) == len(case.objective.windows)
    for coalitions, one, other in zip(drawn, values, again):
        segments = Segments(game.features.labels, coalitions, game.reference, case.image)
        assert segments.identity(0) == game.segments(coalitions).identity(0)
        assert_equal(one, case.change(case.objective, segments))
        assert torch.equal(one, other)
