"""What do the networks answer to? One object is taken away or added, all else of the case stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from causes import Cause

__all__ = ["Experiment", "experiments"]


@dataclass
class Experiment:
    """Margins (logit of a lesion less that of none) before and after.

    Attributes:
        what: the change in words.
        before, after: margins, one a case.
    """

    what: str
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)

    @property
    def flipped(self) -> list[bool]:
        """Whether the answer changed, one a case."""
        return [(b > 0) != (a > 0) for b, a in zip(self.before, self.after)]


def experiments(cause: Cause, seeds: range) -> tuple[list[bool], list[Experiment]]:
    """Which answers are right, and what each change does to cases that are answered right and that it changes.

    Objects are taken away where they are, and added where they are not.
    """
    cases = cause.cases(seeds)
    found = {
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
            experiment = found[key, add]
            experiment.before.append(before)
            experiment.after.append(cause.margin(cases.with_planted(index, **change)["image"]))
    return right, [experiment for experiment in found.values() if experiment.before]
