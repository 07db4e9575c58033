"""Methods: notes, gaps, cheap copies, statements that are checked when the class is defined."""

from __future__ import annotations

import pytest
import torch

from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import UsageError
from esegeta_monai.methods import IntegratedGradients, Method, Occlusion, Saliency, SmoothGrad
from esegeta_monai.methods.base import Explained, Outcome, completeness


def test_the_notes_of_a_target_are_its_entries_of_lists_and_tensors():
    notes = {"each": [1, 2], "tensor": torch.tensor([3.0, 4.0]), "other": [1, 2, 3], "all": "text", "scalar": 5}
    explained = Explained(torch.zeros(2, 1, 4), {**notes, "table": torch.eye(2), "number": torch.tensor(6.0)})
    expected = {"each": 2, "tensor": 4.0, "other": [1, 2, 3], "all": "text", "scalar": 5}
    assert explained.note(1) == {**expected, "table": [0.0, 1.0], "number": 6.0}
    assert Explained(torch.zeros(1, 1, 4)).note(0) == {}


def test_an_outcome_begins_empty():
    assert Outcome() == Outcome(result=None, error=None, scores=None)


def test_the_gap_is_relative_to_the_change_of_f():
    maps = torch.tensor([[[1.0, 2.0]], [[1.0, -1.0]], [[4.0, 0.0]]])
    notes = completeness(maps, torch.tensor([4.0, 0.0, 2.0]))
    assert notes["completeness_gap"] == [pytest.approx(0.25), None, pytest.approx(1.0)]
    assert notes["completeness_gap_of_map"] == [pytest.approx(1 / 3), 0.0, pytest.approx(0.5)]
    absorbed = completeness(maps, torch.tensor([4.0, 0.0, 2.0]), torch.tensor([1.0, 1.0, -1.0]))
    assert absorbed["completeness_gap"] == [0.0, None, pytest.approx(0.5)]
    assert absorbed["completeness_gap_of_map"] == [0.0, pytest.approx(0.5), pytest.approx(0.25)]
    assert completeness(0 * maps, torch.tensor([4.0, 0.0, 2.0]))["completeness_gap_of_map"] == [None] * 3


def test_a_cheap_copy_has_few_steps_inside_too_and_leaves_black_box_methods():
    method = SmoothGrad(IntegratedGradients(n_steps=50), n_samples=30)
    cheap = method.cheap_copy()
    assert (cheap.n_samples, cheap.method.n_steps) == (4, 4)
    assert (method.n_samples, method.method.n_steps) == (30, 50)
    assert IntegratedGradients(n_steps=2).cheap_copy().n_steps == 2
    assert IntegratedGradients(tolerance=0.1).cheap_copy().tolerance is None
    occlusion, saliency = Occlusion(4), Saliency()
    assert occlusion.cheap_copy() is occlusion
    assert saliency.cheap_copy() is saliency


def test_the_methods_inside_are_its_parameters():
    inner = Saliency()
    assert SmoothGrad(inner).inside() == [inner]
    assert inner.inside() == []


@pytest.mark.parametrize("missing", ["produces", "additive", "units"])
def test_a_class_states_what_its_map_is(missing):
    stated = {"produces": "input map", "additive": False, "units": "none"}
    del stated[missing]

    def attribute(self: Method, objective: Objective) -> torch.Tensor:
        return objective.new_maps()

    with pytest.raises(UsageError, match=f"Vague.{missing} is missing"):
        type("Vague", (Method,), {**stated, "attribute": attribute}, registered=False)
