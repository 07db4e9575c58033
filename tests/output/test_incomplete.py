"""An incomplete map is written, counted, warned of, finished for the next run, and named in the report."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from esegeta_monai import Explainer
from esegeta_monai.methods import IntegratedGradients, Saliency
from esegeta_monai.output.report import write_report
from esegeta_monai.output.writer import ResultWriter
from esegeta_monai.targets import ClassScore

METHODS = [IntegratedGradients(baseline=0.0, n_steps=1, method="riemann_left"), Saliency()]


def _network() -> nn.Module:
    """F = (1 + Σ x)²: the gradient at the baseline 0 is far too small."""

    class Square(nn.Module):
        def forward(self, x: Any) -> Any:
            total = x.flatten(1).sum(1, keepdim=True) + 1
            return torch.cat([0 * total, total**2], 1)

    return Square()


def _run(folder: Any) -> ResultWriter:
    image = MetaTensor(torch.full((1, 4, 4, 4), 0.5) + torch.arange(64).reshape(1, 4, 4, 4) / 64)
    writer = ResultWriter(folder, METHODS, [ClassScore(1)])
    with writer.run:
        writer.explain(Explainer(_network(), on_error="record"), image, "case", METHODS, [ClassScore(1)])
    return writer


def test_an_incomplete_map_is_a_result(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    writer = _run(tmp_path)
    assert writer.run.summary == {"incomplete": 1, "ok": 1}
    assert writer.run.exit_code == 0
    assert "misses what it should add up to" in caplog.text
    (path,) = tmp_path.rglob("*_IntegratedGradients_attr.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    total = float((torch.full((64,), 0.5) + torch.arange(64) / 64).sum())
    change, summed = (total + 1) ** 2 - 1, 2 * total  # F(x) − F(0), and the gradient at 0 times x
    assert record["status"] == "incomplete"
    assert record["completeness_gap"] == pytest.approx((change - summed) / change, rel=1e-4)
    assert record["completeness_gap_of_map"] == pytest.approx((change - summed) / summed, rel=1e-4)
    assert path.with_suffix(".nii.gz").is_file()
    assert _run(tmp_path).run.summary == {"skipped": 2}
    page = write_report(tmp_path).index
    pages = " ".join(p.read_text(encoding="utf-8") for p in {page, *tmp_path.rglob("*.html")})
    assert "1 incomplete map" in pages
    assert '<span class="tag warn" title="">incomplete</span>' in pages
