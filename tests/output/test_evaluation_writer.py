"""The table of metrics on disk: tidy, extended case by case."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy.ndimage import gaussian_filter
from torch import nn

from esegeta_monai import Explainer
from esegeta_monai.errors import UsageError
from esegeta_monai.explain.evaluation import EvaluationResult, Evaluator
from esegeta_monai.methods import InputXGradient
from esegeta_monai.metrics import Deletion
from esegeta_monai.output.evaluation_writer import COLUMNS, REGION_COLUMNS, EvaluationWriter
from esegeta_monai.targets import ClassScore
from tests.explain.judged import judged


def test_the_table_is_tidy_and_grows_by_cases(tmp_path):
    result = judged()
    writer = EvaluationWriter(tmp_path, [], [], {"bundle": "none"})
    for case in ("a", "b", "a"):
        writer.write(case, result)
    with open(tmp_path / "metrics.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == COLUMNS
    assert [r["case"] for r in table] == ["b"] * len(result.rows) + ["a"] * len(result.rows)
    assert float(table[0]["value"]) == result.rows[0]["value"]
    record = json.loads((tmp_path / "a" / "a_metrics.json").read_text(encoding="utf-8"))
    assert record["bundle"] == "none"
    (curve,) = [c for c in record["curves"] if c["method"] == "InputXGradient" and c["metric"].startswith("Deletion")]
    assert len({len(v) for v in curve.values() if isinstance(v, list)}) == 1
    with open(tmp_path / "a" / "a_regions.csv", encoding="utf-8", newline="") as file:
        regions = list(csv.DictReader(file))
    assert tuple(regions[0]) == REGION_COLUMNS
    assert {"all", "label 1", "body"} <= {r["region"] for r in regions}


@pytest.mark.parametrize("baseline", ["auto", "blur"])
@pytest.mark.parametrize("features", ["blocks", "grid(size=5)"])
def test_a_deletion_score_is_repeated_from_the_files_by_plain_inference(tmp_path, features, baseline):
    """Only the written record, the map and the network are read: what was removed, by what, and on which grid."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 400, 2)).double()
    image = MetaTensor(torch.rand(2, 20, 20, dtype=torch.float64))
    explainer, method, target = Explainer(network), InputXGradient(), ClassScore(1)
    (attribution,) = explainer(image[None], [method], [target])
    metric = Deletion(features=features, steps=7, baseline=baseline)
    result = Evaluator(explainer, [metric], with_controls=False)(image, [method], [target])
    path = EvaluationWriter(tmp_path, [method], [target]).write("a", result)

    record = json.loads(path.read_text(encoding="utf-8"))
    (row,) = record["metrics"]
    used = row["used"]
    assert record["network_grid"] == list(image.shape[1:])
    assert record["image_sha256"] == attribution.record["image_sha256"]
    assert np.allclose(record["network_affine"], image.affine.numpy())
    if baseline == "auto":
        assert used["baseline"]["chosen_by"] == "auto"
        reference = torch.tensor(used["baseline"]["values"], dtype=torch.float64).reshape(2, 1, 1).expand(2, 20, 20)
    else:
        sigma = used["baseline"]["sigma_voxels"]
        reference = torch.stack([torch.from_numpy(gaussian_filter(c, sigma, mode="nearest")) for c in image.numpy()])
    size = used["features"]["size"]
    sides = [size] * 2 if isinstance(size, int) else size
    places = [(i, j) for i in range(0, 20, sides[0]) for j in range(0, 20, sides[1])]
    boxes = [(slice(None), slice(i, i + sides[0]), slice(j, j + sides[1])) for i, j in places]
    means = [float(attribution.map.as_tensor().sum(0, keepdim=True)[box].mean()) for box in boxes]
    order = sorted(range(len(boxes)), key=lambda b: -means[b])
    x, scores = torch.as_tensor(image).as_subclass(torch.Tensor).clone(), []
    counts = np.unique(np.round(np.linspace(0, len(order), min(7, len(order)) + 1)).astype(int))
    with torch.no_grad():
        for count in counts:
            for box in order[:count]:
                x[boxes[box]] = reference[boxes[box]]
            scores.append(float(network(x[None])[0, 1]))
    y = (np.array(scores) - scores[-1]) / abs(scores[0] - scores[-1])
    assert row["value"] == pytest.approx(float(np.trapezoid(y, counts / len(order))), abs=1e-6)


def test_rows_of_an_earlier_run_do_not_stay_where_a_case_has_none_now(tmp_path):
    result = judged()
    writer = EvaluationWriter(tmp_path, [], [])
    writer.write("a", result)
    writer.write("b", result)
    writer.write("a", EvaluationResult(failed={"ClassScore-class1, InputXGradient": "out of memory"}))
    with open(tmp_path / "metrics.csv", encoding="utf-8", newline="") as file:
        assert {r["case"] for r in csv.DictReader(file)} == {"b"}


def test_a_table_that_a_spreadsheet_wrote_again_is_kept_and_another_one_refused(tmp_path):
    EvaluationWriter(tmp_path, [], []).write("a", judged())
    table = tmp_path / "metrics.csv"
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())
    EvaluationWriter(tmp_path, [], []).write("b", judged())
    with open(table, newline="", encoding="utf-8") as file:
        assert {r["case"] for r in csv.DictReader(file)} == {"a", "b"}
    for content in (b"case;target\na;b\n", "case,target\nKöln,b\n".encode("latin-1")):
        table.write_bytes(content)
        with pytest.raises(UsageError, match=r"metrics\.csv .*move it away"):
            EvaluationWriter(tmp_path, [], [])
        assert table.read_bytes() == content
