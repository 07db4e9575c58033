"""Shapley values of prompts: a network whose values follow from its points in closed form, and enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from esegeta_monai.engine.network.model import Model
from esegeta_monai.errors import MethodError
from esegeta_monai.methods import PromptShapley
from esegeta_monai.targets import Case, ThresholdMask
from tests.support.objectives import build_objective, explain
from tests.support.tensors import close


class Prompted(nn.Module):
    """A map from the image, raised near positive points, lowered near negative ones, times a factor of the class."""

    def forward(self, x: Tensor, point_coords: Tensor, point_labels: Tensor, class_vector: Tensor | None) -> Tensor:
        axes = torch.meshgrid(*[torch.arange(n, dtype=x.dtype) for n in x.shape[2:]], indexing="ij")
        total = torch.zeros_like(x[0, 0])
        for place, label in zip(point_coords[0], point_labels[0]):
            near = torch.exp(-sum((a - p) ** 2 for a, p in zip(axes, place)) / 8)
            total = total + {1: 1.0, 0: -1.0, -1: 0.0}[int(label)] * near
        factor = 1.0 if class_vector is None else 1.0 + float(class_vector)
        return (x + factor * torch.tanh(total))[:, :1]


def objective(dims: int, labels: list[int], **more: object):
    image = torch.rand(1, *[8] * dims, dtype=torch.float64, generator=torch.Generator().manual_seed(dims))
    coords = torch.tensor([[[2.0] * dims, [5.0] * dims, [3.0] * (dims - 1) + [2.0]]], dtype=torch.float64)
    given = {"point_coords": coords, "point_labels": torch.tensor([labels]), "class_vector": torch.tensor(0.5), **more}
    model = Model(Prompted().eval(), torch.device("cpu"), kwargs=given)
    with torch.no_grad():
        prediction = model(image[None])[0]
    scores = ThresholdMask(0.6, channel=0, value="raw").bind(prediction, Case())
    return build_objective(model, image, scores, prediction)


@pytest.mark.parametrize("dims", [2, 3])
def test_equals_the_mean_over_all_orders(dims):
    o = objective(dims, [1, 0, 1])
    network, image = o.model.network, o.image[None]
    score = o.scores[0]

    def value(inside: frozenset[int]) -> float:
        given = dict(o.model.kwargs)
        labels = given["point_labels"].clone()
        for j in range(3):
            if j not in inside:
                labels[0, j] = -1
        given |= {"point_labels": labels, "class_vector": given["class_vector"] if 3 in inside else None}
        return float(score.value(score.crop(network(image, **given)[0])))

    expected = torch.zeros(4, dtype=torch.float64)
    for order in itertools.permutations(range(4)):
        before: frozenset[int] = frozenset()
        for j in order:
            expected[j] += (value(before | {j}) - value(before)) / math.factorial(4)
            before |= {j}
    explained = explain(PromptShapley(classes="class_vector"), o)
    table = explained.notes["features"][0]
    assert [row["feature"] for row in table] == ["point 0", "point 1", "point 2", "class"]
    close(torch.tensor([row["value"] for row in table], dtype=torch.float64), expected)
    assert explained.notes["completeness_gap"][0] < 1e-12
    assert table[0]["value"] > 0 > table[1]["value"]  # a negative point lowers the score
    for j, place in enumerate(o.model.kwargs["point_coords"][0].long().tolist()):
        assert float(explained.maps[(0, 0, *place)]) == pytest.approx(float(expected[j]))
    assert int((explained.maps != 0).sum()) == 3


def test_a_point_that_is_ignored_has_no_value():
    o = objective(2, [1, -1, 1])
    table = explain(PromptShapley(), o).notes["features"][0]
    assert table[1]["value"] == 0
    assert table[0]["value"] != 0


def test_errors_name_the_way_out():
    o = objective(2, [1, 0, 1])
    with pytest.raises(MethodError, match="it has class_vector, point_coords, point_labels"):
        explain(PromptShapley(labels="labels"), o)
    with pytest.raises(MethodError, match="points=None"):
        explain(PromptShapley(points="places"), o)
    with pytest.raises(MethodError, match="outside of the image"):
        explain(PromptShapley(), objective(2, [1, 0, 1], point_coords=torch.full((1, 3, 2), 9.0)))
    many = objective(2, [1] * 3, point_labels=torch.ones(1, 11))
    with pytest.raises(MethodError, match="at most 10"):
        explain(PromptShapley(), many)
