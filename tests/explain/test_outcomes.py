"""Status and warnings of finished maps."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
from torch import Tensor

from esegeta_monai import Explainer
from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import MethodError
from esegeta_monai.methods import (
    BlurIG,
    Explained,
    IntegratedGradients,
    Saliency,
)
from esegeta_monai.methods.base import Method
from esegeta_monai.targets import MultiClassMask, Voxel
from tests.explain.support import SLIDING, Mirrored, NotFinite, Spy, image, only


class Misses(Method):
    """A map with a completeness gap for each target."""

    produces = "input map"
    additive = True
    units = "target per voxel"
    gap_advice = "take more of them"
    gaps: Sequence[float | None] = ()

    def attribute(self, objective: Objective) -> Explained:
        return Explained(objective.new_maps() + 1, {"completeness_gap": list(self.gaps)})


def test_a_completeness_gap_above_five_percent_is_warned_of_whatever_the_method() -> None:
    methods = [Misses([0.06, None]), Misses([0.04, 0.05], name="fine")]
    result = list(Explainer(Spy(), SLIDING)(image(), methods, [MultiClassMask(1), MultiClassMask(0, name="air")]))
    reported = {w for a in result for w in a.record["warnings"]}
    assert reported == {
        "MultiClassMask-class1: Misses: the map's sum misses what it should add up to by 6 %: take more of them"
    }
    assert not any(a.record["warnings"] for a in result if a.method.name == "fine")
    short = [BlurIG(n_steps=1), IntegratedGradients(n_steps=1, method="riemann_left")]
    for a in Explainer(Spy(), SLIDING)(5 * image(), short, [Voxel(1, index=(6, 6, 6), output="log_probability")]):
        assert a.record["completeness_gap"] > 0.05
        assert any(w.startswith(f"{a.label}: {a.method.name}: ") for w in a.record["warnings"])


class Nothing(Saliency):
    def attribute(self, objective: Any) -> Tensor:
        return objective.new_maps()


def test_maps_that_are_not_finite_are_never_ok() -> None:
    result = only(Explainer(Spy(), SLIDING, on_error="record")(image(), [NotFinite()], [MultiClassMask(1)]))
    assert (result.status, result.map, result.record["sum"]) == ("failed", None, None)
    assert "144 of 1728 values of the map are not finite" in result.record["reason"]
    with pytest.raises(MethodError, match="not finite"):
        list(Explainer(Spy(), SLIDING)(image(), [NotFinite()], [MultiClassMask(1)]))


def test_a_map_of_zeros_is_called_zero() -> None:
    result = only(Explainer(Spy(), SLIDING)(image(), [Nothing()], [MultiClassMask(1)]))
    assert (result.status, result.record["sum"]) == ("zero", 0.0)
    assert result.map is not None
    assert any("zero everywhere" in w for w in result.record["warnings"])


def test_warnings_are_recorded_not_lost() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = only(Explainer(Spy(), Mirrored())(image(), [Saliency()], [MultiClassMask(1)]))
    assert result.record["warnings"]
