"""Mixed precision: autocast where it gives what float32 gives, float32 where it does not.

Half precision rounds relative to the largest terms: a prediction stays correct to three digits while its gradient, or
the small effect of a perturbation, is noise. So each method is measured before it runs. A cheap copy is computed on the
first window that each target sees, under autocast and in float32. If the correlation is below `SURE` for any target, or
autocast loses values, the whole method runs in float32. Whole maps then correlate with float32 by at least `AGREES`:
likely, not certainly, since another window may differ (docs/evidence.md). Maps that autocast makes zero or not finite
are computed again in float32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from esegeta_monai.engine.default_layer import default_layer
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.run_context import RunContext
from esegeta_monai.errors import MethodTimeout, RankLost, named_reason
from esegeta_monai.methods.base import Method, Outcome
from esegeta_monai.utils.tensors import all_finite

__all__ = ["AGREES", "SURE", "Agreement", "agreement", "full_precision", "run_precisely"]

logger = logging.getLogger("esegeta_monai")

AGREES = 0.99
"""Correlation with float32 that a whole map should have."""

SURE = 0.997
"""Correlation that one window must have. It is a sample: whole maps have up to three times its noise."""

SAMPLED = 16
"""Perturbations scored per window to measure a method that perturbs the image."""

KEPT = 0.5
"""Share of float32's non-zero values that autocast must keep: less is underflow, even if the correlation is high."""

NOT_WORTH_IT = "measuring would take as many passes as the map in float32"
"""Reason for not measuring a method, see `_pays`."""

RunMethods = Callable[["Sequence[Method]", Objective], "list[Outcome]"]


@dataclass(frozen=True)
class Agreement:
    """The agreement of autocast and float32 on one method.

    Attributes:
        correlation: Pearson's r on the first window of each target; None if it is not defined.
        fallback: reason for running the method in float32; None: it runs under autocast.
    """

    correlation: list[float | None] = field(default_factory=list)
    fallback: str | None = None

    def notes(self) -> dict[str, Any]:
        """Return the entries of the record."""
        return {"amp_correlation": self.correlation or None, "amp_fallback": self.fallback}


def run_precisely(methods: Sequence[Method], objective: Objective, run_methods: RunMethods) -> list[Outcome]:
    """Run methods together, each in the precision that is enough for it.

    Without `Model.amp` there is one precision. With it, methods with `Method.full_precision` run in float32 and are not
    measured. The others are measured first; their notes have ``amp_correlation`` and ``amp_fallback``. A method inside
    another one is not measured again.

    Args:
        methods: the methods.
        objective: the case.
        run_methods: runs methods in the precision of the objective.

    Returns:
        The outcome of each method, in order.
    """
    if objective.model.autocast_dtype is None:
        return run_methods(methods, objective)
    outcomes: dict[int, Outcome] = {}
    agreements: dict[int, Agreement] = {}
    half = [i for i, m in enumerate(methods) if not m.full_precision]
    inside = objective.context.precision_decided
    if half and not inside:
        agreements = {i: Agreement(fallback=NOT_WORTH_IT) for i in half if not _pays(methods[i], objective)}
        half = [i for i in half if i not in agreements]
    if half and not inside:
        measured = measure([methods[i] for i in half], objective, run_methods)
        agreements |= dict(zip(half, objective.context.processes.gather(measured)[0]))
        half = [i for i in half if agreements[i].fallback is None]
    if half:
        with _precision_decided(objective.context):
            outcomes = dict(zip(half, run_methods([methods[i] for i in half], objective)))
    if not inside:
        for i, reason in _lost(outcomes, objective).items():
            agreements[i] = replace(agreements[i], fallback=reason)
            del outcomes[i]
    again = [i for i in range(len(methods)) if i not in outcomes]
    if again:
        precise = full_precision(objective)
        outcomes |= zip(again, run_methods([methods[i] for i in again], precise))
        if precise.knows("value"):  # the value that these maps explain
            for result in (outcomes[i].result for i in again):
                if result is not None:
                    result.notes.setdefault("value", precise.image_values())
    for i, agreement in agreements.items():
        if agreement.fallback is not None:
            logger.warning("%s runs in float32: %s", methods[i].name, agreement.fallback)
        if (result := outcomes[i].result) is not None:
            result.notes |= agreement.notes()
    return [outcomes[i] for i in range(len(methods))]


def full_precision(objective: Objective) -> Objective:
    """Return the objective without autocast, the same one at each call; the objective itself if it has no autocast.

    It shares no value that was computed in half precision: unperturbed scores, checkpoints and the prediction at the
    image are its own. Masks do not change.
    """
    if objective.model.autocast_dtype is None:
        return objective
    return objective.memo("full precision", lambda: objective.derive(full_precision=True))


def _pays(method: Method, objective: Objective) -> bool:
    """Return True if measuring is cheaper than the method in float32: not so for few steps on a volume of one window,
    nor for few perturbations."""
    predictions = method.predictions(objective)
    if predictions is None:
        return len(objective.plan) > 1 or 2 * method.cheap_copy().passes(objective) < method.passes(objective)
    first = {windows[0] for windows in objective.score_windows if windows}
    return 2 * len(first) * min(SAMPLED, predictions) < method.passes(objective)


def measure(methods: Sequence[Method], objective: Objective, run_methods: RunMethods) -> list[Agreement]:
    """Measure how each method agrees with float32 on the first window that each target sees.

    Cheap copies (`Method.cheap_copy`) run on these windows alone, once in float32 and once under autocast; gradient and
    CAM methods share passes as usual. Maps are compared. For methods that perturb the image, the score changes of
    `SAMPLED` perturbations are compared: a map of a few would not be the method's map.
    """
    cheap = [m.cheap_copy() for m in methods]
    context = RunContext.for_sample(SAMPLED, objective.window_batch, local=False)
    half = objective.derive(first_windows=1, context=context)
    full = full_precision(half)
    precise = run_methods(cheap, full)
    if full.knows("default layer"):  # gradients that underflow must not choose the layer
        for other in (half, objective):
            other.memo("default layer", lambda: default_layer(full))
    rough = run_methods(cheap, half)
    dtype = str(objective.model.autocast_dtype).removeprefix("torch.")
    return [_compared(a, b, dtype) for a, b in zip(rough, precise)]


def _compared(rough: Outcome, precise: Outcome, dtype: str) -> Agreement:
    b = _values(precise)
    if isinstance(b, Exception):
        return Agreement(fallback=f"float32 gave nothing to compare on the first window: {named_reason(b)}")
    a = _values(rough)
    if isinstance(a, Exception):
        return Agreement(fallback=f"it fails in {dtype}: {named_reason(a)}")
    agreements = [agreement(half, full, dtype) for half, full in zip(a, b)]
    correlations = [r for r, _ in agreements]
    worst = min((r for r in correlations if r is not None), default=None)
    lost = [why for r, why in agreements if r is None or r == worst]
    return Agreement(correlations, next((why for why in lost if why is not None), None))


def agreement(rough: Tensor, precise: Tensor, dtype: str = "half precision") -> tuple[float | None, str | None]:
    """Correlate two tensors of equal shape where either is not zero.

    Positions where both are zero, such as those outside the window, would make any two maps alike.

    Args:
        rough: values under autocast, of any shape.
        precise: values in float32, of the same shape.
        dtype: name of the autocast dtype, for the reason.

    Returns:
        Pearson's r, or None if it is not defined; and the reason why it is not enough, or None.

    >>> correlation, reason = agreement(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0]))
    >>> round(correlation, 6), reason
    (1.0, None)
    >>> agreement(torch.tensor([0.0, 0.0, 3.0]), torch.tensor([1.0, 2.0, 3.0]))[1]
    'underflow: of 3 values that are not zero in float32, half precision keeps 1'
    """
    a, b = (v.detach().flatten().to(_for_sums(v.device), torch.float64) for v in (rough, precise))
    if not bool(torch.isfinite(a).all()):
        return None, f"overflow: {int((~torch.isfinite(a)).sum())} values are not finite in {dtype}"
    nonzero = int((b != 0).sum())
    if not nonzero:
        return None, "the first window is zero in float32, so there is nothing to compare"
    kept = int(((a != 0) & (b != 0)).sum())
    if kept < KEPT * nonzero:
        return None, f"underflow: of {nonzero} values that are not zero in float32, {dtype} keeps {kept}"
    seen = (a != 0) | (b != 0)
    a, b = a[seen] - a[seen].mean(), b[seen] - b[seen].mean()
    norm = float(a.norm() * b.norm())
    if not norm > 0:  # NaN too: float32 itself is not finite
        return None, "the first window's values do not vary, so they have no correlation with float32"
    r = min(1.0, float(a @ b) / norm)
    return r, None if r >= SURE else f"correlation {r:.4f} with float32 on the first window, below {SURE}"


def _for_sums(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device  # which has no float64


def _values(outcome: Outcome) -> Tensor | Exception:
    """Return the values to compare (k, …): scores if the method perturbs the image, else maps; or its error."""
    if outcome.scores is not None:
        return outcome.scores
    if outcome.result is not None:
        return outcome.result.maps
    assert outcome.error is not None
    return outcome.error


def _lost(outcomes: dict[int, Outcome], objective: Objective) -> dict[int, str]:
    """Return reasons to compute results of autocast again, by position; the same in all processes."""
    dtype = str(objective.model.autocast_dtype).removeprefix("torch.")
    lost: dict[int, str] = {}
    for i, outcome in outcomes.items():
        if isinstance(outcome.error, (MethodTimeout, RankLost)):
            continue
        if outcome.result is None:
            assert outcome.error is not None
            lost[i] = f"it fails in {dtype}: {named_reason(outcome.error)}"
        elif not all_finite(outcome.result.maps):
            lost[i] = f"overflow: the map has values that are not finite in {dtype}"
        elif not bool(outcome.result.maps.flatten(1).any(1).all()):
            lost[i] = f"underflow: the map is zero everywhere in {dtype}"
    everywhere: dict[int, str] = {}
    for lost_there in objective.context.processes.gather(lost):
        everywhere = lost_there | everywhere
    return everywhere


@contextmanager
def _precision_decided(context: RunContext) -> Iterator[None]:
    """Do not measure methods that other methods run, inside the context."""
    before, context.precision_decided = context.precision_decided, True
    try:
        yield
    finally:
        context.precision_decided = before
