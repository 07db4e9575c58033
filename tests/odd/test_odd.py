"""Six methods on each odd case, against truths without the package; the whole table is ``python -m tests.odd``."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.odd import CASES, KINDS, batch, stochastic
from tests.odd.base import OddCase
from tests.odd.known import KNOWN
from tests.odd.measure import METHOD_NAMES, deviation, measure
from tests.odd.table import expected, opened
from tests.odd.truth import INDEPENDENT, Truth

TRUTHS: dict[str, dict[str, Any]] = {}
GOOD = ("right", "handled", "warned", "refused", "none", "open")
# Twins of heads and outputs return another quantity, and windows are blended: there, maps are compared only.
WITH_TWIN = [
    case
    for case in CASES
    if case.twin is not None
    and case.inferer is None
    and case.kind not in ("heads", "outputs", "pipelines")
    and not isinstance(case.image, dict)
]


def named(case: OddCase) -> str:
    return f"{case.kind}-{case.name}".replace(" ", "-").replace(",", "")


def cells() -> list[object]:
    parameters: list[object] = []
    for case in CASES:
        for method in INDEPENDENT:
            reason = KNOWN.get((case.name, method))
            marks = [pytest.mark.xfail(strict=True, reason=reason)] if reason else []
            parameters.append(pytest.param(case, method, id=f"{named(case)}-{method}", marks=marks))
    return parameters


@pytest.mark.parametrize(("case", "method"), cells())
def test_no_map_is_silently_wrong(case: OddCase, method: str) -> None:
    if case.name not in TRUTHS:
        TRUTHS.clear()  # tests of a case follow each other
    outcome = measure(method, case, TRUTHS.setdefault(case.name, {}))
    assert outcome.verdict in GOOD, f"{outcome.verdict} {outcome.figure} {outcome.note}"


@pytest.mark.parametrize("case", WITH_TWIN, ids=named)
def test_the_twin_computes_the_same_function(case: OddCase) -> None:
    """At the image and at the baseline."""
    truth, network = Truth(case), case.odd().eval()
    dtype = next((p.dtype for p in network.parameters()), torch.float64)
    more = case.call()
    args, kwargs = more.get("network_args", ()), more.get("network_kwargs", {})
    for x in (case.plain_image, case.baseline[None]):
        with torch.no_grad():
            own = network(x.clone().to(dtype), *copy.deepcopy(args), **copy.deepcopy(kwargs))[0]
        assert deviation(own, truth.predict(x)) <= case.tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_cases(kind: str) -> None:
    assert sum(case.kind == kind for case in CASES) >= 7


def test_there_are_enough_cases_with_unique_names() -> None:
    assert len(CASES) >= 60
    assert max(Counter(case.name for case in CASES).values()) == 1
    assert {name for name, _ in KNOWN} <= {case.name for case in CASES}


def test_every_method_and_case_has_a_row_in_the_table() -> None:
    known = opened().cells
    missing = [key[1:3] for key in expected() if key not in known]
    assert not missing, f"run make limits: {len(missing)} cells are missing, such as {missing[:3]}"
    assert len(METHOD_NAMES) >= 54


class TestAMeasurementCanFail:
    """A wrong truth makes right maps wrong, and a network without a right map is wrong unless there is a warning."""

    case = batch.CASES[0]

    @pytest.mark.parametrize("method", INDEPENDENT)
    def test_another_function(self, method: str) -> None:
        def twice(prediction: Tensor) -> object:
            score = self.case.score(prediction)
            return lambda y: 2 * score(y)

        assert measure(method, self.case).verdict == "handled"
        outcome = measure(method, replace(self.case, score=twice))  # type: ignore[arg-type]
        assert (outcome.verdict, outcome.figure) == ("wrong", pytest.approx(0.5))

    def test_no_right_map(self) -> None:
        assert measure("Saliency", replace(self.case, twin=None)).verdict == "wrong"
        assert measure("Saliency", stochastic.CASES[0]).verdict == "warned"

    def test_a_refusal_must_name_the_cause(self) -> None:
        case = replace(self.case, target="ClassScore(9)")
        assert measure("Saliency", replace(case, cause="no such class")).verdict == "refused"
        assert measure("Saliency", replace(case, cause="batch")).verdict == "error"
