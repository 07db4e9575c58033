"""A postprocessing is read: what precedes and follows MONAI's mean of an ensemble, and its weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.transforms import Activationsd, AsDiscreted, Compose, EnsureTyped, MeanEnsembled, SaveImaged, VoteEnsembled

from esegeta_monai.errors import UsageError
from esegeta_monai.explain.mean_ensemble import read_mean

KEYS = ["pred_0", "pred_1"]


def steps(*before: Any, **mean: Any) -> list[Any]:
    return [
        EnsureTyped(KEYS),
        *before,
        MeanEnsembled(KEYS, output_key="pred", **mean),
        AsDiscreted("pred", argmax=True),
    ]


@pytest.mark.parametrize("weights", [None, [1.0, 3.0], [[1.0, 1.0], [3.0, 3.0]]])
@pytest.mark.parametrize("average", ["output", "softmax", "sigmoid"])
def test_the_mean_equals_monai(average: str, weights: Any) -> None:
    before = [] if average == "output" else [Activationsd(KEYS, **{average: True})]
    transforms = steps(*before, weights=weights)
    mean = read_mean(Compose(transforms), KEYS)
    raw = {key: torch.randn(2, 4, 5) for key in KEYS}
    expected = Compose(transforms[:-1])(dict(raw))["pred"]
    activation = {"output": lambda x: x, "softmax": lambda x: x.softmax(0), "sigmoid": torch.sigmoid}[average]
    ours = sum(w * activation(raw[key]) for w, key in zip(mean.weights, KEYS))
    torch.testing.assert_close(ours, torch.as_tensor(expected))
    assert (mean.average, mean.key, len(mean.after)) == (average, "pred", 1)
    joined = mean.of([raw[key][None] for key in KEYS])
    if average == "output":
        torch.testing.assert_close(joined[0], torch.as_tensor(expected))
    else:
        torch.testing.assert_close(joined, torch.cat([raw[key] for key in KEYS])[None])


def test_weights_follow_the_keys_of_the_evaluator() -> None:
    mean = read_mean([MeanEnsembled(["pred_1", "pred_0"], output_key="pred", weights=[3.0, 1.0])], KEYS)
    assert mean.weights == pytest.approx((0.25, 0.75))


@pytest.mark.parametrize(
    ("transforms", "words"),
    [
        ([VoteEnsembled(KEYS, output_key="pred")], "explain the mean instead, MeanEnsembled"),
        ([AsDiscreted(KEYS, argmax=True), MeanEnsembled(KEYS, output_key="pred")], "put MeanEnsembled before it"),
        ([AsDiscreted("pred", argmax=True)], "no transform of the postprocessing averages"),
        ([MeanEnsembled(["pred_0"], output_key="pred")], "but not pred_1"),
        (
            [MeanEnsembled(KEYS, output_key="pred", weights=[[1.0, 2.0], [3.0, 1.0]])],
            "one weight for each of the 2 networks",
        ),
        ([Activationsd("pred_0", softmax=True), MeanEnsembled(KEYS, output_key="pred")], "predictions of all networks"),
        (
            [
                Activationsd(KEYS, softmax=True),
                Activationsd(KEYS, sigmoid=True),
                MeanEnsembled(KEYS, output_key="pred"),
            ],
            "two activations",
        ),
    ],
)
def test_other_ensembles_are_refused(transforms: list[Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read_mean(transforms, KEYS)


def test_transforms_of_other_keys_do_not_matter() -> None:
    other = [SaveImaged("pred"), AsDiscreted("label", argmax=True)]
    assert read_mean([*other, MeanEnsembled(KEYS, output_key="pred")], KEYS).key == "pred"
