"""Names of the results of a run, in files and in tables."""

from __future__ import annotations

from collections.abc import Sequence

import esegeta_monai.files as storage
from esegeta_monai.errors import UsageError
from esegeta_monai.explain.attribution import Attribution
from esegeta_monai.methods.base import Method
from esegeta_monai.targets.base import Target

__all__ = ["ResultNames"]


class ResultNames:
    """A name for each method and target of a run; names of the same kind include the parameters that differ.

    Args:
        methods, targets: those of the run.

    Raises:
        UsageError: two names are equal.

    >>> from esegeta_monai.methods import Saliency
    >>> from esegeta_monai.targets import MultiClassMask
    >>> target, methods = MultiClassMask(1), [Saliency(), Saliency(abs=False)]
    >>> names = ResultNames(methods, [target])
    >>> [names.method(m) for m in methods], names.target(target, "MultiClassMask-white matter")
    (['Saliency-absTrue', 'Saliency-absFalse'], 'MultiClassMask-white matter')
    """

    def __init__(self, methods: Sequence[Method], targets: Sequence[Target]) -> None:
        self._methods = dict(zip(map(id, methods), storage.distinct_names(methods)))
        self._targets = dict(zip(map(id, targets), storage.distinct_names(targets)))
        storage.check_clashes([], self._targets.values(), self._methods.values())

    def of(self, attribution: Attribution) -> tuple[str, str]:
        """Return the names of an attribution's target and method, the latter with its image input, if it is of one."""
        method = self.method(attribution.method)
        method = f"{method}-{attribution.input}" if attribution.input else method
        return self.target(attribution.target, attribution.label), method

    def method(self, method: Method) -> str:
        """Return the name of a method of the run.

        Raises:
            UsageError: the method is not one of the run.
        """
        if id(method) not in self._methods:
            raise UsageError(
                f"{method!r} is not one of the methods of this run: create methods and targets once, as instances, and "
                "pass the same ones to the writer and to its explain"
            )
        return self._methods[id(method)]

    def target(self, target: Target, label: str) -> str:
        """Return the target's name: its label (with the class), and the other parameters that distinguish it."""
        given = target.given_name
        if given:
            return label if label != type(target).__name__ else given
        extra = self._targets.get(id(target), "").removeprefix(type(target).__name__)
        own = [p for p in extra.split("-") if p and not p.startswith("class_index")]
        return "-".join([label, *own])
