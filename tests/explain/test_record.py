"""The record covers all that determines a map: also files, tensors, data named by parameters, further inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from esegeta_monai import methods as m
from esegeta_monai.engine.baselines import Image
from esegeta_monai.engine.feature_masks import LabelMap
from esegeta_monai.explain.case import CaseInput
from esegeta_monai.explain.record import inputs_sha256


def hashed(method: m.Method, **more) -> str | None:
    return inputs_sha256(method, CaseInput(0, MetaTensor(torch.zeros(1, 4, 4)), None, more.pop("data", {}), **more))


LABELS = torch.arange(16).reshape(4, 4)


@pytest.mark.parametrize(
    "build",
    [
        lambda v: m.FeatureAblation(LABELS + v),
        lambda v: m.FeatureAblation((LABELS + v).numpy()),
        lambda v: m.FeatureAblation(LabelMap(LABELS + v)),
        lambda v: m.Occlusion(2, baseline=Image(LABELS + v)),
        lambda v: m.FeaturePermutation([LABELS, LABELS + v]),
        lambda v: m.SmoothGrad(m.IntegratedGradients(baseline=LABELS + v)),
    ],
)
def test_tensors_in_parameters(build):
    assert hashed(build(0)) == hashed(build(0))
    assert hashed(build(0)) != hashed(build(1))


@pytest.mark.parametrize(
    "text", ["{}", "LabelMap('{}')", 'supervoxels(mask="{}")', "supervoxels(mask={}, n_segments=5)"]
)
def test_files_in_parameters(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, method = "atlas.nii.gz", m.FeatureAblation(text.format("atlas.nii.gz"))
    assert hashed(method) is None  # which is an error later
    seen = []
    for content in (b"one", b"two", b"three"):
        Path(name).write_bytes(content)
        seen.append(hashed(method))
    assert len({*seen, None}) == 4


@pytest.mark.parametrize("text", ["key:atlas", "LabelMap(atlas)"])
def test_data_in_parameters(text):
    method = m.FeatureAblation(text)
    first, second = (hashed(method, data={"atlas": LABELS + v, "other": v}) for v in (0, 1))
    assert first != second
    assert first == hashed(method, data={"atlas": np.array(LABELS)})


def test_further_inputs_of_the_network():
    method, one, two = m.Occlusion(2), torch.zeros(1, 4, 4), torch.ones(1, 4, 4)
    assert hashed(method) is None
    for more in ({"condition": one}, {"args": [one]}, {"kwargs": {"scale": one}}):
        changed = {k: two if k == "condition" else [two] if k == "args" else {"scale": two} for k in more}
        assert len({hashed(method, **more), hashed(method, **changed), None}) == 3
