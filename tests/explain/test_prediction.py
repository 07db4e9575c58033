"""The unperturbed prediction of a case, by the user's inferer."""

from __future__ import annotations

import pytest
import torch
from monai.inferers import SliceInferer

from esegeta_monai import Explainer
from esegeta_monai.errors import NetworkError
from esegeta_monai.methods import (
    Saliency,
)
from esegeta_monai.targets import Box, MultiClassMask, PredictedClasses
from tests.explain.support import SLIDING, Mirrored, Spy, autograd, image, only


def test_a_given_prediction_is_not_computed_again() -> None:
    network = Spy()
    prediction = SLIDING(image(), network).detach()
    corner = Box(1, (0, 0, 0), (2, 2, 2))
    counts = []
    for known in (prediction, None):
        network.seen = 0
        result = only(Explainer(network, SLIDING, checks=False)(image(), [Saliency()], [corner], prediction=known))
        counts.append(network.seen)
    assert counts == [1, 9]  # one window sees the corner; the prediction takes eight
    assert result.record["windows_used"] == 1


def test_unknown_inferers_are_one_window_with_a_warning() -> None:
    network = Spy()
    result = only(Explainer(network, Mirrored())(image(), [Saliency(abs=False)], [MultiClassMask(1)]))
    assert any("Mirrored" in w and "memory" in w for w in result.record["warnings"])
    assert result.record["windows_total"] == 1
    expected = autograd(network, image(), Mirrored(), 1)
    assert (result.map.as_tensor() - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_record_has_the_inferer_as_it_was_given() -> None:
    inferer = SliceInferer(spatial_dim=2, roi_size=(8, 8))  # MONAI adds an axis to its roi_size when it runs
    result = only(Explainer(Spy(dims=2), inferer)(image(), [Saliency()], [MultiClassMask(0)]))
    assert result.record["inferer"]["roi_size"] == [8, 8]


def test_slice_inferer_explains_volumes_by_a_flat_network() -> None:
    network, inferer = Spy(dims=2), SliceInferer(spatial_dim=2, roi_size=(8, 8), sw_batch_size=3, overlap=0.25)
    result = only(Explainer(network, inferer)(image(), [Saliency(abs=False)], [MultiClassMask(0)]))
    expected = autograd(network, image(), inferer, 0)
    assert (result.map.as_tensor() - expected).abs().max() < 1e-5 * expected.abs().max()


def test_predictions_that_are_not_finite_are_refused() -> None:
    network = Spy()
    with torch.no_grad():
        network.last.bias.fill_(torch.inf)
    with pytest.raises(NetworkError, match="prediction has values that are NaN or infinite"):
        list(Explainer(network, SLIDING)(image(), [Saliency()], [PredictedClasses()]))
