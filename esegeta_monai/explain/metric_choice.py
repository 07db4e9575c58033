"""The metrics of an evaluation: sets by name, single metrics, and those that a label adds."""

from __future__ import annotations

import difflib
from typing import Any

from esegeta_monai.errors import UsageError
from esegeta_monai.metrics.base import METRICS, Metric
from esegeta_monai.utils.names import distinct_names

__all__ = ["ALL", "METRIC_SETS", "QUICK", "WITH_LABEL", "chosen_metrics", "metrics_for"]

QUICK = "quick"
"""The set that is measured where none is chosen."""

ALL = "all"
"""Every registered metric."""

METRIC_SETS: dict[str, tuple[str, ...]] = {
    QUICK: ("Infidelity(n_samples=10)", "Sparseness", "Entropy"),
    "full": ("Deletion", "Insertion", "Infidelity", "FaithfulnessCorrelation", "Sparseness", "Entropy"),
}
"""Metrics by the name of their set. The quick set scores ten changed images, which all maps and targets of a case
share; most of them change only some of the windows."""

WITH_LABEL = ("PointingGame", "RelevanceMass", "RelevanceRank", "LocalisationAUC", "DistanceProfile")
"""Metrics that each set adds if there is a label; they do not run the network."""


def chosen_metrics(metrics: Any) -> str | list[Metric]:
    """Return the name of a set, or metrics.

    Args:
        metrics: ``"quick"`` or ``"full"``, see `METRIC_SETS`; ``"all"``; instances, names or configs; None:
            ``"quick"``.

    Raises:
        UsageError: a wrong metric or parameter, or two metrics with the same name.

    >>> chosen_metrics(None), [type(metric).__name__ for metric in chosen_metrics("Deletion,Entropy")]
    ('quick', ['Deletion', 'Entropy'])
    """
    name = metrics.strip().lower() if isinstance(metrics, str) else QUICK if metrics is None else None
    if name in METRIC_SETS:
        return str(name)
    names = metrics.split(",") if isinstance(metrics, str) else metrics if isinstance(metrics, (list, tuple)) else []
    among = [one for one in names if isinstance(one, str) and one.strip().lower() in (*METRIC_SETS, ALL)]
    if among and name != ALL:
        raise UsageError(f"metrics={metrics!r}: {among[0].strip()!r} is a set of metrics and stands alone")
    if name and (sets := difflib.get_close_matches(name, (*METRIC_SETS, ALL), n=1, cutoff=0.75)) and name != ALL:
        raise UsageError(f"metrics={metrics!r}: did you mean the set {sets[0]!r}?")
    chosen = METRICS.create_all(list(METRICS) if name == ALL else metrics)
    distinct_names(chosen)
    return chosen


def metrics_for(choice: str | list[Metric], *, label: bool) -> list[Metric]:
    """Return the metrics of a case.

    Args:
        choice: of `chosen_metrics`.
        label: True if the case has a label: a set then has `WITH_LABEL` too.
    """
    if not isinstance(choice, str):
        return choice
    return METRICS.create_all([*METRIC_SETS[choice], *(WITH_LABEL if label else ())])
