"""The order of the results of a run: that in which a command asked for them, not that in which they end."""

from __future__ import annotations

from collections.abc import Sequence

from esegeta_monai.explain.attribution import Attribution
from esegeta_monai.methods.base import Method
from esegeta_monai.targets.base import Target

__all__ = ["ResultOrder"]


class ResultOrder:
    """The order in which results were asked for: the number of the case, then method, target, and class or component.

    Args:
        methods, targets, cases: those of the run, in their order.
    """

    def __init__(self, methods: Sequence[Method], targets: Sequence[Target], cases: Sequence[str]) -> None:
        self._cases = {name: number for number, name in enumerate(cases)}
        self._methods = {id(method): number for number, method in enumerate(methods)}
        self._targets = {id(target): number for number, target in enumerate(targets)}
        self._labels: tuple[str, dict[tuple[int, str, str | None], int]] = ("", {})

    def of(self, case: str, attribution: Attribution | None = None) -> list[int]:
        """Return the numbers of a result; without an attribution, those of a case that failed as a whole.

        The classes or components of a target are numbered as they come; `Explainer` names all of a case before it runs
        the first method.
        """
        number = self._cases.setdefault(case, len(self._cases))
        if attribution is None:
            return [number]
        if self._labels[0] != case:
            self._labels = (case, {})
        target = id(attribution.target)
        label = (target, attribution.label, attribution.input)
        place = self._labels[1].setdefault(label, len(self._labels[1]))
        return [number, self._methods[id(attribution.method)], self._targets.get(target, len(self._targets)), place]
