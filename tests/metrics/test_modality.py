"""Channel importance against enumeration by whole volumes; MSFI by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

from esegeta_monai.errors import MetricError, UsageError
from esegeta_monai.metrics import MSFI, MetricInput, ModalityImportance, controls
from esegeta_monai.targets import Box, MultiClassMask
from tests.metrics.cases import ranked, segmentation
from tests.support.networks import small
from tests.support.objectives import Naive
from tests.support.shapley import enumerated
from tests.support.tensors import noise


def label_of(shape):
    label = torch.zeros(shape, dtype=torch.bool)
    label[tuple(slice(1, 4) for _ in shape)] = True
    return label


@pytest.mark.parametrize("dims", [2, 3])
def test_against_enumeration(dims):
    shape = (3, 9, 12) if dims == 2 else (3, 8, 8, 9)
    case = Naive(small(dims, 3), noise(*shape), [MultiClassMask(1), Box(2, (1,) * dims, (5,) * dims)])
    labels = torch.arange(3).reshape(-1, *(1,) * dims).expand(shape)
    truth = enumerated(case, labels, 3, torch.full_like(case.image, 0.2)).numpy()
    values, label = noise(*shape, seed=8), label_of(shape[1:])
    for k in (0, 1):
        subject = MetricInput(values, case.objective, k, label=label)
        result = ModalityImportance(baseline=0.2).update(subject)
        positive = values.clamp(min=0).flatten(1).sum(1).numpy()
        assert result.value == pytest.approx(kendalltau(positive, truth[k]).statistic)
        assert result.notes["shapley"] == pytest.approx(truth[k].tolist(), rel=1e-8)
        signed = ModalityImportance(baseline=0.2, correlation="pearson", part="signed").update(subject)
        assert signed.value == pytest.approx(np.corrcoef(values.flatten(1).sum(1), truth[k])[0, 1])
        weight = np.maximum(truth[k], 0)
        share = (values.clamp(min=0) * label).flatten(1).sum(1).numpy() / positive
        if weight.any():
            expected = (weight * share).sum() / weight.sum()
            assert MSFI(baseline=0.2).update(subject).value == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("dims", [2, 3])
def test_perfect_first_and_zero_never(dims):
    case = segmentation(dims)
    metric = ModalityImportance(baseline=0.0, correlation="pearson", part="signed")
    values = ranked(metric, case)
    assert values["perfect"] == pytest.approx(1)
    assert values["zero"] is None
    assert values["control:constant"] is None
    label = label_of(case.image.shape[1:])
    with torch.no_grad():  # every channel raises the target
        case.net.weight.abs_()
    case = Naive(case.net, case.image.abs(), [Box(1, (1,) * dims, (4,) * dims)])
    inside = MetricInput(label.double().expand(case.image.shape), case.objective, label=label)
    metric = MSFI(baseline=0.0)
    assert metric.update(inside).value == 1
    for control in controls():
        assert metric.update(MetricInput(control.map(case.image, 0), case.objective, label=label)).value < 0.9
    assert metric.update(MetricInput(torch.zeros_like(case.image), case.objective, label=label)).value == 0


def test_refusals():
    case = segmentation(2)
    with pytest.raises(MetricError, match="one map for all channels"):
        ModalityImportance().update(MetricInput(case.image[:1], case.objective))
    one = Naive(small(2, 1), noise(1, 8, 12))
    with pytest.raises(MetricError, match="the image has one"):
        ModalityImportance().update(MetricInput(one.image, one.objective))
    with pytest.raises(UsageError, match="correlation"):
        ModalityImportance(correlation="spearman")
