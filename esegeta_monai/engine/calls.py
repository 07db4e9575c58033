"""Parts of an ensemble: the objectives of some members or views alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

from esegeta_monai.engine.member_score import MembersScore
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.windows.plan import Call, WindowPlan

__all__ = ["parts_of"]


def parts_of(objective: Objective, key: Callable[[Call], Hashable]) -> list[tuple[float, Objective]]:
    """Return the objective of each group of calls alone, with its share in the prediction.

    The parts have the masks, baselines, draws and default layer of the whole, and weights that sum to 1. For scores
    linear in the prediction, F is the sum over the parts of share times F of the part.

    Args:
        objective: that of an ensemble or of mirrored views.
        key: calls of equal key form a group: those of a member, say, or of a view.
    """
    plan = objective.plan
    groups: dict[Hashable, list[Call]] = {}
    for call in dict.fromkeys(plan.calls):
        groups.setdefault(key(call), []).append(call)

    def share(calls: Sequence[Call]) -> float:
        return math.fsum(plan.share(call) for call in calls)

    total = share([call for calls in groups.values() for call in calls])
    parts = []
    for calls in groups.values():
        apart = plan.apart and len({call.member for call in calls}) == plan.member_count
        scores = objective.scores
        if plan.apart and not apart:
            scores = [score.alone() if isinstance(score, MembersScore) else score for score in scores]
        parts.append((share(calls) / total, objective.of_calls(_only(plan, calls, apart), scores)))
    return parts


def _only(plan: WindowPlan, calls: Sequence[Call], apart: bool) -> WindowPlan:
    """Return the plan of some calls alone, with weights that sum to 1 (for each member that is kept apart)."""
    total = math.fsum(call.weight for call in calls) / (plan.member_count if apart else 1)
    scaled = {call: replace(call, weight=call.weight / total) for call in calls}
    windows = [w for w in range(len(plan)) if plan.call(w) in scaled]
    return replace(
        plan,
        slices=tuple(plan.slices[w] for w in windows),
        owned=tuple(plan.owned[w] for w in windows) if plan.owned else (),
        calls=tuple(scaled[plan.call(w)] for w in windows),
        member_weights=plan.member_weights if apart else (),
    )
