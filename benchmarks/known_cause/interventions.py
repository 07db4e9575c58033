"""Test what the networks use: remove or add one object and leave the rest of the case unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from causes import Cause

__all__ = ["Experiment", "experiments"]


@dataclass
class Experiment:
    """Margins (logit of "lesion" minus that of "none") before and after a change.

    Attributes:
        what: the change in words.
        before, after: margins, one per case.
    """

    what: str
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)

    @property
    def flipped(self) -> list[bool]:
        """True per case if the answer changed."""
        return [(b > 0) != (a > 0) for b, a in zip(self.before, self.after)]


def experiments(cause: Cause, seeds: range) -> tuple[list[bool], list[Experiment]]:
    """Return the correctness of answers, and the effect of each change on correctly answered cases.

    Objects are removed from cases that have them, and added to cases that do not.
    """
    cases = cause.cases(seeds)
    by_key = {
        (key, add): Experiment(f"{key} {'added' if add else 'removed'}")
        for key in sorted(cases.objects, key=lambda key: key != cause.truth)
        for add in (False, True)
    }
    right = []
    for index in range(len(cases)):
        case = cases[index]
        before = cause.margin(case["image"])
        right.append((before > 0) == bool(case["label"]))
        if not right[-1]:
            continue
        for key in cases.objects:
            add = not case[key].any()
            change: Mapping[str, bool] = {key: add}
            experiment = by_key[key, add]
            experiment.before.append(before)
            experiment.after.append(cause.margin(cases.with_planted(index, **change)["image"]))
    return right, [experiment for experiment in by_key.values() if experiment.before]
